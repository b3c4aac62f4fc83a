"""A continuation is tokenised with its prompt, whoever scores it, and a written one continues its prompt's text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.backends import tiny_folder
from helpers.every_tokenizer import KINDS, TEXTS, beyond, folder_of, tokenizer_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import mlx_lqr
from mlx_lqr import InputError, tasks
from mlx_lqr.backends.text.tokenizer import Tokenizer
from mlx_lqr.runtime import Chat
from mlx_lqr.runtime.generate import _pieces
from mlx_lqr.tasks.generations import Generations
from mlx_lqr.tasks.scorers import mentions

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
CONTINUED = ("llama", "metaspace", "gemma", "unigram", "byte-level")
QUESTIONS = [
    ("Question: what is 2 + 2? Answer:", ["4", "the dog", "the hill"]),
    ("Question: what is 2 + 2? Answer: ", ["4", "the dog", "x"]),
    ("Hello", ["world", "there."]),
    ("A:\n", ["Once", "The sea"]),
]


@functools.cache
def folder(kind: str, family: str = "llama") -> Path:
    """A tiny model with a tokenizer of this kind."""
    made = tiny_folder(family, vocab_size=tokenizer_of(kind).get_vocab_size(), tie_word_embeddings=False)
    return folder_of(kind, made, chat_template=TEMPLATE)


@functools.cache
def model_of(kind: str) -> Any:
    return mlx_lqr.load(folder(kind), backend="mlx", dtype="float32")


def transformers_score(kind: str, common: Sequence[int], whole: Sequence[int]) -> float:
    """log p of what a text has beyond its beginning, from transformers' own logits of the whole."""
    network = AutoModelForCausalLM.from_pretrained(folder(kind), dtype=torch.float32)
    with torch.no_grad():
        logits = network(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(logits[at - 1, whole[at]]) for at in range(len(common), len(whole)))


@pytest.mark.parametrize("kind", CONTINUED)
def test_answers_are_scored_as_transformers_reads_the_whole_text(kind: str) -> None:
    theirs = AutoTokenizer.from_pretrained(folder(kind))
    scores = tasks.Steered(model_of(kind)).scores(QUESTIONS)
    for (prompt, answers), actual in zip(QUESTIONS, scores, strict=True):
        own = theirs.encode(prompt)
        wholes = [theirs.encode(prompt + ("" if prompt[-1].isspace() else " ") + answer) for answer in answers]
        common = next(n for n in range(len(own), 0, -1) if all(whole[:n] == own[:n] for whole in wholes))
        expected = [transformers_score(kind, own[:common], whole) for whole in wholes]
        assert actual == pytest.approx(expected, abs=1e-3)
        assert len(own) - common <= 1, "no more than the border's token"


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_continuation_make_the_tokens_of_the_whole(kind: str) -> None:
    tokenizer, plain = Tokenizer(folder(kind), {}), tokenizer_of(kind)
    for text in TEXTS:
        for at in range(1, len(text), 7):
            before, after = tokenizer.continuations(text[:at], [text[at:], " x", ""])
            whole = plain.encode(text).ids
            assert [*before, *after[0]] == whole
            assert [*before, *after[1]] == plain.encode(text[:at] + " x").ids
            assert [*before, *after[2]] == plain.encode(text[:at]).ids, "all have the same tokens before them"
            single, (alone,) = tokenizer.continuations(text[:at], [""])
            assert (single, alone) == (plain.encode(text[:at]).ids, [])


@pytest.mark.parametrize("kind", CONTINUED)
def test_a_prompt_that_is_given_as_ids_stays_as_it_is(kind: str) -> None:
    tokenizer, plain = Tokenizer(folder(kind), {}), tokenizer_of(kind)
    for text in TEXTS:
        words = text.split(" ")
        prompt, answer = " ".join(words[:4]), " " + " ".join(words[4:])
        ids = plain.encode(prompt).ids
        before, (after,) = tokenizer.continuations(ids, [answer])
        assert before == ids
        assert plain.decode([*before, *after]) == text
        assert tokenizer.continuations(ids, [""])[1] == [[]]
        odd = [*ids, tokenizer.first_token]  # no text is read as these
        assert tokenizer.continuations(odd, [answer])[0] == odd
        assert plain.decode(tokenizer.continuations(odd, [answer])[1][0]).strip() == answer.strip()


def test_what_no_token_is_before_follows_the_first_token(tmp_path: Path) -> None:
    """Without a BOS token, a prompt may merge with its answer as a whole."""
    made = folder_of("byte-level", tmp_path)
    bare = tokenizer_of("byte-level")
    bare.post_processor = None  # type: ignore[assignment]
    bare.save(str(made / "tokenizer.json"))
    tokenizer = Tokenizer(made, {})
    assert tokenizer.encode("He") == [bare.token_to_id("He")]
    assert tokenizer.continuations("H", ["e"]) == ([bare.token_to_id("<s>")], [[bare.token_to_id("He")]])
    assert tokenizer.continuations("", ["He"]) == ([bare.token_to_id("<s>")], [[bare.token_to_id("He")]])
    (made / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match="give a longer prompt"):
        Tokenizer(made, {}).continuations("H", ["e"])


@pytest.mark.parametrize("kind", ["llama", "metaspace", "byte-level"])
@pytest.mark.parametrize("chat", [True, False])
def test_a_judge_reads_a_text_with_its_prompt(kind: str, chat: bool) -> None:
    class Nothing:
        settings: dict[str, Any] = {}  # noqa: RUF012

        def score(self, texts: Sequence[str], rows: range) -> list[dict[str, Any]]:
            return [{} for _ in texts]

        def metrics(self, rows: Any, groups: Any) -> dict[str, Any]:
            return {}

    prompts = ["Once upon a", "Question: what"]
    part = Generations(prompts, Nothing(), tasks.Decoding(max_tokens=9, temperature=1.0, seed=5), chat=chat)
    theirs = AutoTokenizer.from_pretrained(folder(kind))
    for row in part.rows(tasks.Steered(model_of(kind)), range(2)):
        prompt = f"<s>[INST] {row['prompt']} [/INST]" if chat else row["prompt"]
        own, whole = (theirs.encode(text, add_special_tokens=not chat) for text in (prompt, prompt + row["text"]))
        common = next(n for n in range(len(own), 0, -1) if whole[:n] == own[:n])
        assert row["nats"] == pytest.approx(-transformers_score(kind, own[:common], whole), abs=1e-3)
        assert row["judged_tokens"] == len(whole) - common


def test_yes_and_no_are_scored_behind_the_question() -> None:
    model = model_of("llama")
    mentioned = mentions(tasks.Steered(model), "sea", ["The sea is deep."])[0]
    asked = 'Does this text have to do with "sea"? Answer Yes or No.'
    text = f'Text: "The sea is deep."\nQuestion: {asked}\nAnswer:'
    theirs = AutoTokenizer.from_pretrained(folder("llama"))
    own = theirs.encode(text)
    yes, no = (transformers_score("llama", own, theirs.encode(f"{text} {word}")) for word in ("Yes", "No"))
    assert mentioned == pytest.approx(1 / (1 + np.exp(no - yes)), abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "metaspace", "gemma", "byte-level"])
def test_written_texts_continue_their_prompts_byte_for_byte(kind: str) -> None:
    """Random weights write bytes that are no characters, which no seed may make fail."""
    model, plain = model_of(kind), tokenizer_of(kind)
    prompts = ["Hello", "Hello wor", "Once upon a time, ", "犬は", "A:\n"]
    options: mlx_lqr.Options = {"max_tokens": 10, "temperature": 1.5}
    batch = mlx_lqr.batch_generate(model, prompts * 3, seed=7, **options)
    for i, prompt in enumerate(prompts * 3):
        pieces = list(mlx_lqr.stream(model, prompt, seed=7 + i, **options))
        ids = plain.encode(prompt).ids
        tokens = [piece.token for piece in pieces if piece.token is not None]
        text = "".join(piece.text for piece in pieces)
        assert text == batch[i] == beyond(plain.decode(ids), plain.decode([*ids, *tokens]))
        if i < len(prompts):
            stop = text[len(text) // 2 :][:2]
            assert mlx_lqr.generate(model, prompt, seed=7 + i, stop=stop, **options) == text[: text.find(stop)]


def test_a_stop_string_is_found_in_what_comes_at_the_very_end() -> None:
    model, ids = model_of("llama"), tokenizer_of("llama").get_vocab()

    def said(*spelled: str) -> str:
        """The text of tokens as if the model had written them."""
        tokens = ((0, ids[token]) for token in spelled)
        return "".join(piece.text for _, piece in _pieces(model, tokens, [[1]], ("\ufffd", "@x"), set()))

    assert said("a", "<0x40>", "<0xE2>") == "a"
    assert said("a", "<0x40>") == "a@"
    assert said("a", "<0x40>", "x") == "a"


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_what_a_chat_streams_is_what_it_keeps(kind: str) -> None:
    model = model_of(kind)
    chat = Chat(model, options={"max_tokens": 12, "temperature": 1.5, "seed": 3})
    plain = tokenizer_of(kind)
    for question in ("Hello", "Und die Straße?"):
        pieces = list(chat.answer(question))
        assert chat.messages[-1]["content"] == "".join(piece.text for piece in pieces)
        prompt = model.tokenizer.chat(chat.messages[:-1])
        tokens = [piece.token for piece in pieces if piece.token is not None]
        whole = plain.decode([*prompt, *tokens])
        assert chat.messages[-1]["content"] == beyond(plain.decode(prompt), whole)
