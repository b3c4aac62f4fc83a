"""What free answers are like at the recommended strengths: do they have the concept, do they run into a loop?

    python benchmarks/long_answers.py laws demo --backend torch --dtype bfloat16
    python benchmarks/long_answers.py penalties demo --judge GEMMA --backend torch --dtype bfloat16
    python benchmarks/long_answers.py conversations demo --backend torch --dtype bfloat16

The tables of docs/comparison.md count short answers, and its ablation texts of the unsteered model. A model that writes
on reads its own words: a push that does not let go of a concept once it is there can end in "marine marine marine".
Questions are those for tuning; each law is at the strength where the divergence of `calibrate` reaches the budget.
`laws` compares laws, on answers drawn without a penalty, which would hide what they end in. `penalties` compares what
keeps longer answers of today's law out of loops, and what that costs. `conversations` asks one question after another,
each with all answers before it, as a chat does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import Any, Literal

import click
import numpy as np
from comparison.ablation import unsure
from report import print_means

import mlx_lqr  # first, so that MLX gets its BLAS
from mlx_lqr.backends.protocol import GREEDY, Array, Law, Model, Recorder, Sampling
from mlx_lqr.backends.text.text_tokenizer import Message
from mlx_lqr.lqr.concept_prompts import concept_prompts, framed
from mlx_lqr.lqr.fit import solve_controller
from mlx_lqr.lqr.layers import choose_layers
from mlx_lqr.lqr.prompts import Prompt
from mlx_lqr.lqr.strength import BUDGETS
from mlx_lqr.methods.alqr import STRENGTHS, LinearFeedback
from mlx_lqr.methods.calibration import Search, Texts
from mlx_lqr.methods.running import law_on
from mlx_lqr.methods.steering import Steering, in_conversation
from mlx_lqr.runtime.decode import decode
from mlx_lqr.tasks.chat import bundled_questions
from mlx_lqr.tasks.concept import word_family, word_pattern
from mlx_lqr.tasks.generations import Judge, chat_prompt
from mlx_lqr.tasks.steering import Steered

CONCEPTS = ("ocean", "dog", "church", "love")
WORDS = {"garden": "garden*", "volcanoes": "volcano*"}
"""Concepts that are fitted by `fit --concept-word`, and what they are known by"""
TOKENS, LONG, FACT_TOKENS = 80, 300, 24
TURNS, SEEDS = 4, (0, 1)
"""Of a conversation; each is held once for each seed"""
SIDE_BY_SIDE = 16
Conversation = list[Message]
END, LOOPS = 40, 0.5
"""An answer loops where more than a half of the pairs of neighbours among its last 40 tokens were there before."""
HELD_AT = 2.0
CLOSE = 0.8
"""Of the best layer, where pushes go in any direction"""
JACOBIAN_PROMPTS = 8


class Saturated(LinearFeedback):
    """The whole feedback about a setpoint of 2 mu_k, with a limit that grows with the strength: a constant push where
    the concept is off, none where it is on.

    The error is min(2 mu_k + level_k - w_k . z_k, strength mu_k).
    """

    def _error(self, layer: int, z: Array) -> Array:
        limit = float(self.strength[0]) * (mu := float(self.controller.magnitude[layer, 0]))
        error = super()._error(layer, z) + (HELD_AT * mu - limit)
        return error - (error - limit) * (error > limit)


PENALTIES: dict[str, dict[str, float]] = {
    "none": {"frequency_penalty": 0.0},
    "frequency 0.2": {"frequency_penalty": 0.2},
    "frequency 0.3, the default": {},
    "presence 1": {"frequency_penalty": 0.0, "presence_penalty": 1.0},
    "repetition 1.1, prompt included": {"frequency_penalty": 0.0, "repetition_penalty": 1.1},
}


def linear(model: Model) -> type[LinearFeedback]:
    return LinearFeedback


def saturated(model: Model) -> type[LinearFeedback]:
    return Saturated


VARIANTS: dict[str, tuple[dict[str, Any], Callable[[Model], type[LinearFeedback]]]] = {
    "fit's own": ({}, linear),
    "fit's own, tokens that the model is sure of left alone": ({}, unsure),
    "fit's own with a tenth of the feedback": ({"feedback": 0.1}, linear),
    "fit's own with a hundredth": ({"feedback": 0.01}, linear),
    "any direction: a quarter of the feedback": ({"push": "free", "feedback": 0.25}, linear),
    "any direction: a half": ({"push": "free", "feedback": 0.5}, linear),
    "any direction: the whole": ({"push": "free", "feedback": 1.0}, linear),
    "any direction: the whole, saturated": ({"push": "free", "feedback": 1.0}, saturated),
}


def answers(model: Model, prompts: Sequence[Prompt], law: Law | None, sampling: Sampling, most: int) -> list[list[int]]:
    written: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(prompts), SIDE_BY_SIDE):
        batch = prompts[start : start + SIDE_BY_SIDE]
        for i, token in decode(model, batch, law=law, sampling=sampling, max_tokens=most):
            written[start + i].append(token)
    return written


def repeated(tokens: Sequence[int]) -> float:
    """The share of pairs of neighbours at the end of an answer that were there before."""
    pairs = list(zip(tokens[-END:], tokens[-END + 1 :], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def to_questions(model: Model, law: Law | None, sampling: Sampling, most: int) -> list[list[int]]:
    prompts = [chat_prompt(model, question) for question in bundled_questions("tuning")[0]]
    return answers(model, prompts, law, sampling, most)


def facts_right(model: Model, law: Law | None, sampling: Sampling, before: Sequence[Conversation] = ([],)) -> float:
    """Of the factual questions, each asked after one of these conversations."""
    facts = bundled_questions("tuning")[1]
    prompts = [
        model.tokenizer.chat([*messages, {"role": "user", "content": fact.question}])
        if messages
        else chat_prompt(model, fact.question)
        for fact, messages in zip(facts, cycle(before))
    ]
    told = answers(model, prompts, law, sampling, FACT_TOKENS)
    return float(
        np.mean([fact.is_in(model.tokenizer.decode(tokens)) for fact, tokens in zip(facts, told, strict=True)])
    )


def with_concept(model: Model, concept: str, written: Sequence[Sequence[int]]) -> Array:
    pattern = word_pattern([WORDS[concept]] if concept in WORDS else word_family(concept))
    return np.array([bool(pattern.search(model.tokenizer.decode(list(tokens)))) for tokens in written])


def in_loop(written: Sequence[Sequence[int]]) -> Array:
    return np.array([repeated(tokens) > LOOPS for tokens in written])


def counted(model: Model, concept: str, written: Sequence[Sequence[int]]) -> dict[str, float]:
    """What these answers are like."""
    loops, has = in_loop(written), with_concept(model, concept, written)
    return {
        "with the concept": float(has.mean()),
        "in a loop": float(loops.mean()),
        "with it, and no loop": float((has & ~loops).mean()),
        "repeated at the end": float(np.mean([repeated(tokens) for tokens in written])),
    }


def measured(model: Model, concept: str, law: Law | None) -> dict[str, float]:
    sampling = Sampling(temperature=0.8, top_p=0.9, frequency_penalty=0.0, seed=0)
    written = to_questions(model, law, sampling, TOKENS)
    return {**counted(model, concept, written), "facts right": facts_right(model, law, GREEDY)}


def variants(
    model: Model, texts: Texts, concept: str, named: Sequence[str]
) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Each law at each budget, and what was measured."""
    sets = framed(model, mlx_lqr.bundled_prompts(concept))
    contrast, jacobians = mlx_lqr.contrast(model, *sets), mlx_lqr.linearize(model, sets[0][:JACOBIAN_PROMPTS])
    close = choose_layers("auto", contrast, jacobians, least=CLOSE)
    for name in named:
        options, kind_on = VARIANTS[name]
        if "push" in options:
            options = {**options, "layers": close}
        controller = solve_controller(contrast, jacobians, concept=concept, algebra=model.algebra, **options)
        law = partial(kind_on(model), controller)
        search = Search(lambda strength, law=law: texts.divergence(law(strength)), *STRENGTHS.span, first=1.5)
        for budget in ("gentle", "normal"):
            strength = search.reach(BUDGETS[budget])
            yield name, budget, {"KL": search.known[strength], **measured(model, concept, law(strength))}


def penalised(
    model: Model, judge: Recorder, concept: str, law: Law | None, penalty: dict[str, float]
) -> dict[str, float]:
    """What long answers and facts are like, both drawn with a penalty."""
    sampling: Any = partial(Sampling, temperature=0.8, top_p=0.9, seed=0, **penalty)
    written = to_questions(model, law, sampling(), LONG)
    asked = bundled_questions("tuning")[0]
    texts = [
        (question, model.tokenizer.decode(tokens)) for question, tokens in zip(asked, written, strict=True) if tokens
    ]
    surprise = [nll / max(count, 1) for nll, count in Judge(judge).nll(Steered(model), texts, chat=False)]
    return {
        "with the concept": float(with_concept(model, concept, written).mean()),
        "in a loop": float(in_loop(written).mean()),
        "facts right": facts_right(model, law, sampling()),
        "perplexity": float(np.exp(np.median(surprise))),
        "tokens": float(np.mean([len(tokens) for tokens in written])),
    }


def held(
    model: Model, first: Law | None, later: Law | None, seed: int
) -> Iterator[tuple[list[Conversation], list[list[int]]]]:
    """As many conversations as there are questions for, after each turn, and its answers; under a law for the first
    answer and one for those after it."""
    asked = bundled_questions("tuning")[0]
    conversations: list[Conversation] = [[] for _ in range(len(asked) // TURNS)]
    for turn in range(TURNS):
        for i, messages in enumerate(conversations):
            messages.append({"role": "user", "content": asked[i * TURNS + turn]})
        prompts = [model.tokenizer.chat(messages) for messages in conversations]
        written = answers(model, prompts, later if turn else first, Sampling(seed=seed), TOKENS)
        for messages, tokens in zip(conversations, written, strict=True):
            messages.append({"role": "assistant", "content": model.tokenizer.decode(tokens)})
        yield conversations, written


def by_turn(model: Model, concept: str, first: Law | None, later: Law | None) -> Iterator[dict[str, float]]:
    """What the answers of each turn are like, and how many facts are right that are asked after it."""
    for each in zip(*(held(model, first, later, seed) for seed in SEEDS), strict=True):
        before = [messages for conversations, _ in each for messages in conversations]
        all_of_them = [tokens for _, written in each for tokens in written]
        facts = facts_right(model, later, GREEDY, before)
        yield {**counted(model, concept, all_of_them), "facts right": facts}


@click.group()
def main() -> None: ...


SOURCE = click.argument("source")
CONCEPT = click.option("--concept", "concepts", multiple=True, default=CONCEPTS)
BACKEND = click.option("--backend", type=click.Choice(["mlx", "torch"]), default="mlx", show_default=True)
DTYPE = click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)


@main.command()
@SOURCE
@click.option("--judge", required=True, help="The model whose perplexity is told, the median over answers.")
@CONCEPT
@BACKEND
@DTYPE
def penalties(source: str, judge: str, concepts: tuple[str, ...], backend: Literal["mlx", "torch"], dtype: str) -> None:
    """Today's law at the normal budget, long answers, several penalties."""
    model: Any = mlx_lqr.load(source, backend=backend, dtype=dtype)
    reader: Any = mlx_lqr.load(judge, backend=backend, dtype=dtype)
    rows: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for concept in concepts:
        controller = mlx_lqr.fit(model, *framed(model, mlx_lqr.bundled_prompts(concept)), concept=concept)
        law = LinearFeedback(controller, mlx_lqr.calibrate(model, controller).strength["normal"])
        for name, penalty in PENALTIES.items():
            for steered, own in (("unsteered", None), ("steered", law)):
                if own is not None or concept == concepts[0]:
                    rows.setdefault((steered, name), []).append(penalised(model, reader, concept, own, penalty))
                    print(concept, steered, name, rows[steered, name][-1], flush=True)
    print_means(("answers", "penalty"), rows)


@main.command()
@SOURCE
@CONCEPT
@click.option("--law", "named", multiple=True, type=click.Choice(list(VARIANTS)), default=list(VARIANTS))
@BACKEND
@DTYPE
def laws(
    source: str, concepts: tuple[str, ...], named: tuple[str, ...], backend: Literal["mlx", "torch"], dtype: str
) -> None:
    """Several laws at two budgets."""
    model: Any = mlx_lqr.load(source, backend=backend, dtype=dtype)
    texts = Texts.of(model)
    rows: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for concept in concepts:
        rows.setdefault(("unsteered", ""), []).append({"KL": 0.0, **measured(model, concept, None)})
        for name, budget, found in variants(model, texts, concept, named):
            rows.setdefault((name, budget), []).append(found)
            print(concept, name, budget, found, flush=True)
    print_means(("law", "budget"), rows)


@main.command("conversations")
@SOURCE
@click.option("--concept", "concepts", multiple=True, default=(*CONCEPTS, *WORDS))
@BACKEND
@DTYPE
def in_turns(source: str, concepts: tuple[str, ...], backend: Literal["mlx", "torch"], dtype: str) -> None:
    """One question after another, at the normal budget: by the answer's place in the conversation."""
    model: Any = mlx_lqr.load(source, backend=backend, dtype=dtype)
    third = range(2 * model.num_layers // 3, model.num_layers)
    rows: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for concept in concepts:
        sets = framed(model, concept_prompts(concept) if concept in WORDS else mlx_lqr.bundled_prompts(concept))
        own = mlx_lqr.fit(model, *sets, concept=concept)
        if concept == concepts[0]:
            for turn, found in enumerate(by_turn(model, concept, None, None), 1):
                rows["any", "unsteered", str(turn)] = [found]
        pairs: dict[str, tuple[Steering, Steering]] = {
            "fit's own, in a conversation": (own, in_conversation(own)),
            "fit's own, as in a first answer": (own, own),
        }
        added = mlx_lqr.fit_baseline(model, "actadd", *sets, concept=concept, layers=third)
        pairs["actadd, the last third"] = (added, added)
        for name, (first, later) in pairs.items():
            strength = mlx_lqr.calibrate(model, first).strength["normal"]
            laws = law_on(model, first, strength), law_on(model, later, strength)
            for turn, found in enumerate(by_turn(model, concept, *laws), 1):
                sort = "of a word" if concept in WORDS else "bundled"
                rows.setdefault((sort, name, str(turn)), []).append(found)
                print(concept, name, turn, found, flush=True)
    print_means(("set", "law", "answer"), rows)


if __name__ == "__main__":
    main()
