"""What free answers are like at the recommended strengths: do they have the concept, do they run into a loop?

    python benchmarks/long_answers.py demo --backend torch --dtype bfloat16

The tables of docs/comparison.md count short answers, and its ablation texts of the unsteered model. A model that writes
on reads its own words: a push that does not let go of a concept once it is there can end in "marine marine marine".
Questions are those for tuning; each law is at the strength where the divergence of `calibrate` reaches the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import click
import numpy as np
from report import print_means

import mlx_lqr  # first, so that MLX gets its BLAS
from mlx_lqr.backends.protocol import GREEDY, Array, Law, Model, Sampling
from mlx_lqr.lqr.concept_prompts import framed
from mlx_lqr.lqr.fit import solve_controller
from mlx_lqr.lqr.layers import choose_layers
from mlx_lqr.lqr.prompts import Prompt
from mlx_lqr.lqr.strength import BUDGETS
from mlx_lqr.methods.alqr import STRENGTHS, LinearFeedback
from mlx_lqr.methods.calibration import Search, Texts
from mlx_lqr.runtime.decode import decode
from mlx_lqr.tasks.chat import bundled_questions
from mlx_lqr.tasks.concept import word_family, word_pattern
from mlx_lqr.tasks.generations import chat_prompt

CONCEPTS = ("ocean", "dog", "church")
TOKENS, FACT_TOKENS = 80, 24
SIDE_BY_SIDE = 16
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


VARIANTS: dict[str, tuple[dict[str, Any], type[LinearFeedback]]] = {
    "fit's own": ({}, LinearFeedback),
    "any direction: a quarter of the feedback": ({"push": "free", "feedback": 0.25}, LinearFeedback),
    "any direction: a half": ({"push": "free", "feedback": 0.5}, LinearFeedback),
    "any direction: the whole": ({"push": "free", "feedback": 1.0}, LinearFeedback),
    "any direction: the whole, saturated": ({"push": "free", "feedback": 1.0}, Saturated),
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


def measured(model: Model, concept: str, law: Law | None) -> dict[str, float]:
    asked, facts = bundled_questions("tuning")
    pattern, text = word_pattern(word_family(concept)), model.tokenizer.decode
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=0)
    written = answers(model, [chat_prompt(model, question) for question in asked], law, sampling, TOKENS)
    loops = np.array([repeated(tokens) > LOOPS for tokens in written])
    has = np.array([bool(pattern.search(text(tokens))) for tokens in written])
    told = answers(model, [chat_prompt(model, fact.question) for fact in facts], law, GREEDY, FACT_TOKENS)
    right = [fact.is_in(text(tokens)) for fact, tokens in zip(facts, told, strict=True)]
    return {
        "with the concept": float(has.mean()),
        "in a loop": float(loops.mean()),
        "with it, and no loop": float((has & ~loops).mean()),
        "repeated at the end": float(np.mean([repeated(tokens) for tokens in written])),
        "facts right": float(np.mean(right)),
    }


def variants(model: Model, texts: Texts, concept: str) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Each law at each budget, and what was measured."""
    sets = framed(model, mlx_lqr.bundled_prompts(concept))
    contrast, jacobians = mlx_lqr.contrast(model, *sets), mlx_lqr.linearize(model, sets[0][:JACOBIAN_PROMPTS])
    close = choose_layers("auto", contrast, jacobians, least=CLOSE)
    for name, (options, kind) in VARIANTS.items():
        if "push" in options:
            options = {**options, "layers": close}
        controller = solve_controller(contrast, jacobians, concept=concept, algebra=model.algebra, **options)
        law = partial(kind, controller)
        search = Search(lambda strength, law=law: texts.divergence(law(strength)), *STRENGTHS.span, first=1.5)
        for budget in ("gentle", "normal"):
            strength = search.reach(BUDGETS[budget])
            yield name, budget, {"KL": search.known[strength], **measured(model, concept, law(strength))}


@click.command()
@click.argument("source")
@click.option("--concept", "concepts", multiple=True, default=CONCEPTS)
@click.option("--backend", type=click.Choice(["mlx", "torch"]), default="mlx", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
def main(source: str, concepts: tuple[str, ...], backend: Literal["mlx", "torch"], dtype: str) -> None:
    model: Any = mlx_lqr.load(source, backend=backend, dtype=dtype)
    texts = Texts.of(model)
    rows: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for concept in concepts:
        rows.setdefault(("unsteered", ""), []).append({"KL": 0.0, **measured(model, concept, None)})
        for name, budget, found in variants(model, texts, concept):
            rows.setdefault((name, budget), []).append(found)
            print(concept, name, budget, found, flush=True)
    print_means(("law", "budget"), rows)


if __name__ == "__main__":
    main()
