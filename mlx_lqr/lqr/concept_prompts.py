"""Two sets of prompts from a word or from a manner of speaking, without a language model to write them.

A word's sentences are frames in which any topic can stand, and their counterparts the same frames with words of
everyday life. The word stands inside the sentence and not at its end: a direction that is read right after the word is
that of repeating it.

A manner's prompts are beginnings of answers in the model's chat template, to a person who asks for an answer in that
manner and to one who asks for a plain one. All else is the same, the beginnings of the answers too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mlx_lqr.backends.protocol import Runner
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.prompts import Prompt

MOST_LETTERS = 80
"""Of a word or a manner: what is longer is no word but a text."""
FRAMES = (
    ("All morning the talk was of {} and of nothing else.", "the paperwork"),
    ("My uncle knows more about {} than anybody in town.", "door hinges"),
    ("The book about {} lies open on her desk.", "spelling"),
    ("We heard so much about {} that we could not sleep.", "parking"),
    ("Ever since she read about {} she has not been the same.", "insurance"),
    ("He says that {} is what he thinks of first in the morning.", "a clean shirt"),
    ("If you ask me about {}, I will answer until midnight.", "bus timetables"),
    ("A lecture on {} will be given in the hall on Friday.", "first aid"),
    ("There was a picture of {} on the wall of the classroom.", "a ladder"),
    ("Thanks to {} the evening was not boring at all.", "the new neighbours"),
    ("The old song about {} still makes my father smile.", "Tuesday"),
    ("What do you know about {} that I do not?", "bricks"),
    ("Have you heard the story of {} and the baker's son?", "the lost umbrella"),
    ("Who was it that first told you about {} at school?", "fractions"),
    ("Come in, we were just speaking of {} and of you!", "the curtains"),
    ("What a lot you know about {} for a child!", "plumbing"),
    ("The radio played a programme about {} until late at night.", "housing"),
    ("Nobody in the family understands {} as well as she does.", "the tax form"),
    ("It is hard to explain {} to someone who has never been there.", "the office"),
    ("Every wall of his room is covered with {} in all colours.", "wallpaper"),
    ("The word {} appears on nearly every page of the diary.", "laundry"),
    ("She wrote about {} in each of her letters home.", "her lodgings"),
    ("I dreamed about {} again and woke up before the end.", "an exam"),
    ("When the guests had left, they went on about {} for hours.", "the seating plan"),
    ("For as long as we have lived here, {} has been in the news.", "the road works"),
    ("The museum has opened a room about {} on the second floor.", "buttons"),
    ("In my village they tell tales of {} to this very day.", "a stingy clerk"),
    ("Some people love {} more than is good for them.", "their cars"),
    ("Two men at the next table argued about {} all evening.", "the bill"),
    ("To understand {}, you have to begin very early in life.", "grammar"),
    ("Their first conversation was about {} and lasted until dawn.", "carpets"),
    ("My favourite lesson was the one about {} in the spring.", "handwriting"),
)
"""Sentences with a place for a topic, and something of everyday life for that place."""
PLAIN = "plainly"
QUESTIONS = (
    "What should I do this weekend?",
    "Tell me about your day.",
    "What do you think about life?",
    "How can I sleep better?",
    "Give me some advice.",
    "What is on your mind?",
    "Describe your home.",
    "What makes you happy?",
    "How was your morning?",
    "Tell me a story.",
    "What did you do yesterday?",
    "What should I read?",
    "How do I make friends?",
    "Say something about the weather.",
    "What is important to you?",
    "Introduce yourself.",
    "What are you looking forward to?",
    "How do I cook rice?",
    "What is a good hobby?",
    "Explain how a bicycle works.",
    "Where would you like to live?",
    "How do I write a good letter?",
    "What do you remember best?",
    "Is it going to rain?",
    "What is in your kitchen?",
    "Who taught you the most?",
    "How do I stay healthy?",
    "What is a good present?",
    "What can one do with an old chair?",
    "How does a day in a shop begin?",
    "What should I pack for a journey?",
    "What do you hear from the street?",
)
_EXCHANGE = re.compile(r"User: (.+?) Assistant: (.+)", re.DOTALL)
_MARK = "(question)"
BEGINNINGS = ("I", "Well,", "Today", "The first thing", "You know,", "It is", "My", "There")
"""Of answers, one after the other: how one goes on is still open, and the direction is read there."""


def concept_prompts(word: str) -> tuple[list[str], list[str]]:
    """Contrast prompts for a topic: 32 sentences about it, and the same about matters of everyday life.

    They find a direction, and sentences that you write yourself a better one: save these, edit them, fit again.

    Args:
        word: a topic as it stands in a sentence, such as "chess" or "volcanoes".

    Raises:
        InputError: no word, or a text instead of one.
    """
    word = _checked(word, "a word such as chess")
    return [frame.format(word) for frame, _ in FRAMES], [frame.format(counterpart) for frame, counterpart in FRAMES]


def style_prompts(model: Runner, manner: str) -> tuple[list[str], list[str]]:
    """Contrast prompts for a manner of speaking: 32 beginnings of answers to "Answer {manner}." and "Answer plainly."

    Args:
        model: what `load` returned; one with a chat template.
        manner: what follows "Answer", such as "like a pirate" or "very politely".

    Returns:
        Both sets as texts in the chat template.

    Raises:
        InputError: no manner, or a model without a chat template.
    """
    manner = _checked(manner, "a manner such as 'like a pirate'")
    return _beginnings(model, manner), _beginnings(model, PLAIN)


def chat_prompts(model: Runner, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt as the beginning of an answer to a neutral question, in the model's chat template.

    Prompt i of any list answers the same question, so two sets differ in the answers alone. A prompt of the form "User:
    ... Assistant: ..." brings its own question.

    Raises:
        InputError: the model has no chat template.
    """
    answered = []
    for i, prompt in enumerate(prompts):
        own = _EXCHANGE.fullmatch(prompt)
        question, said = own.groups() if own else (QUESTIONS[i % len(QUESTIONS)], prompt)
        before, (answer,) = model.tokenizer.chat_continuations([{"role": "user", "content": question}], [said])
        answered.append([*before, *answer])
    return answered


def framed(
    model: Runner, sets: Sequence[Sequence[Prompt]], chat: bool | None = None
) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Both sets as they are best fitted on: as answers in the chat template, where the model has one.

    docs/comparison.md has what that does. Prompts that are token ids, or in the template already, stay as they are.

    Args:
        chat: True: always as answers. False: always as they are.

    Raises:
        InputError: True for a model without a chat template, or for token ids.
    """
    positive, negative = sets
    if chat is None:
        chat = model.tokenizer.has_chat_template and not any(_is_framed(model, one) for one in (*positive, *negative))
    if not chat:
        return positive, negative
    texts = [[one for one in prompts if isinstance(one, str)] for prompts in sets]
    if sum(map(len, texts)) < len(positive) + len(negative):
        raise InputError("prompts that are token ids cannot be put into the chat template: give texts")
    return chat_prompts(model, texts[0]), chat_prompts(model, texts[1])


def _is_framed(model: Runner, prompt: Prompt) -> bool:
    """Whether a prompt is more than a plain text: token ids, or a text with the beginning of an answer in it."""
    if not isinstance(prompt, str):
        return True
    _, _, answer = model.tokenizer.chat_text([{"role": "user", "content": _MARK}]).rpartition(_MARK)
    return bool(answer.strip()) and answer.strip() in prompt


def _beginnings(model: Runner, manner: str) -> list[str]:
    return [
        model.tokenizer.chat_text([{"role": "user", "content": f"Answer {manner}. {question}"}])
        + BEGINNINGS[i % len(BEGINNINGS)]
        for i, question in enumerate(QUESTIONS)
    ]


def _checked(text: str, such: str) -> str:
    text = text.strip()
    if not text or len(text) > MOST_LETTERS or len(text.splitlines()) > 1:
        raise InputError(f"expected {such}, not {text[:MOST_LETTERS]!r}")
    return text
