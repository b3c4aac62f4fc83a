"""How often texts and answers that a model writes have the concept, by A-LQR's layers, feedback and push.

    python benchmarks/layers_and_feedback.py MODEL --backend torch --dtype bfloat16
    python benchmarks/layers_and_feedback.py MODEL --backend torch --dtype bfloat16 --xstest xstest.jsonl

The ablation of docs/comparison.md reads probabilities off texts of the unsteered model. What a model writes reads its
own words again, and can rank settings otherwise. Openings and questions are those for tuning, and every setting is at
the strength where the divergence of `calibrate` reaches the normal budget. Adding the mean difference (actadd), to the
last third of the layers and to those that `fit` takes, stands beside them. With --xstest it is refusal, and the share
of the unsafe requests for tuning that are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
from comparison.split import part_of
from report import print_means

import mlx_lqr  # first, so that MLX gets its BLAS

# isort: split
from mlx_lqr import tasks
from mlx_lqr.backends.protocol import Model
from mlx_lqr.errors import OverflowingError
from mlx_lqr.lqr.concept_prompts import framed
from mlx_lqr.lqr.fit import solve_controller
from mlx_lqr.lqr.layers import choose_layers
from mlx_lqr.lqr.prompts import Prompt
from mlx_lqr.lqr.strength import BUDGETS
from mlx_lqr.methods.calibration import Search, Texts
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.running import law_on
from mlx_lqr.methods.steering import Steering
from mlx_lqr.tasks.chat import bundled_questions
from mlx_lqr.tasks.concept import bundled_openings, word_pattern
from mlx_lqr.tasks.generations import chat_prompt
from mlx_lqr.tasks.read import read_rows
from mlx_lqr.tasks.refusal import refuses

CONCEPTS = ("dog", "ocean", "church", "love")
TOKENS, TEXTS = 24, 128
JACOBIAN_PROMPTS = 4
CLOSE = 0.8
"""Of the best layer, where `fit` takes a third"""
OWN = "fit's own"


def steerings(model: Model, concept: str) -> Mapping[str, Steering]:
    """What is measured, by name."""
    sets = framed(model, mlx_lqr.bundled_prompts(concept))
    contrast, jacobians = mlx_lqr.contrast(model, *sets), mlx_lqr.linearize(model, sets[0][:JACOBIAN_PROMPTS])
    third = range(2 * model.num_layers // 3, model.num_layers)
    close = choose_layers("auto", contrast, jacobians, least=CLOSE)
    settings: dict[str, dict[str, Any]] = {
        OWN: {},
        "fit's own with a tenth of the feedback": {"feedback": 0.1},
        "fit's own with a hundredth": {"feedback": 0.01},
        "any direction: close layers, half of the feedback": {"push": "free", "feedback": 0.5, "layers": close},
        "any direction: close layers, a tenth": {"push": "free", "feedback": 0.1, "layers": close},
        "any direction: the last third, half": {"push": "free", "feedback": 0.5, "layers": third},
        "any direction: the last third, a tenth": {"push": "free", "feedback": 0.1, "layers": third},
        "along the concept: close layers, half": {"push": "concept", "feedback": 0.5, "layers": close},
        "along the concept: close layers, a tenth": {"push": "concept", "feedback": 0.1, "layers": close},
    }
    made: dict[str, Steering] = {
        name: solve_controller(contrast, jacobians, concept=concept, algebra=model.algebra, **options)
        for name, options in settings.items()
    }
    for name, layers in {"the last third": third, "fit's layers": made[OWN].active_layers}.items():
        made[f"actadd, {name}"] = mlx_lqr.fit_baseline(model, "actadd", *sets, concept=concept, layers=layers)
    return made


def at_normal(model: Model, texts: Texts, steering: Steering) -> tuple[float, float]:
    """The strength of the normal budget, and its divergence."""

    def divergence(strength: float) -> float:
        try:
            return texts.divergence(law_on(model, steering, strength))
        except OverflowingError:
            return float("inf")

    scale = METHODS[steering.method].strengths
    search = Search(divergence, *scale.span, first=scale.suggested)
    strength = search.reach(BUDGETS["normal"])
    return strength, search.known[strength]


def written(model: Model, concept: str, steering: Steering, strength: float, answers: int) -> dict[str, float]:
    """The share of texts, and of so many answers to each question in the chat, with a word of the concept's family."""
    openings = bundled_openings("tuning")
    prompts: dict[str, Sequence[Prompt]] = {"text": (openings * (TEXTS // len(openings) + 1))[:TEXTS]}
    if model.tokenizer.has_chat_template:
        prompts["chat"] = [chat_prompt(model, question) for question in bundled_questions("tuning")[0]] * answers
    pattern, found = word_pattern(tasks.word_family(concept)), {}
    drawing: dict[str, Any] = {
        "max_tokens": TOKENS,
        "temperature": 0.8,
        "top_p": 0.9,
        "frequency_penalty": 0.0,
        "seed": 0,
    }
    for kind, own in prompts.items():
        made = mlx_lqr.batch_generate(model, own, controller=steering, strength=strength, **drawing)
        found[kind] = float(np.mean([bool(pattern.search(text)) for text in made]))
    return found


def refused(model: Model, steering: Steering, strength: float, xstest: Path) -> dict[str, float]:
    """The share of unsafe requests, of those that the comparison tunes by, whose likeliest answer refuses."""
    rows = read_rows(xstest, {"prompt": "text", "label": "text"})
    rows = [row for row in rows if row["label"] == "unsafe" and part_of(row["prompt"]) == "tune"]
    chat = model.tokenizer.has_chat_template
    prompts = [chat_prompt(model, row["prompt"]) if chat else row["prompt"] for row in rows]
    made = mlx_lqr.batch_generate(
        model, prompts, controller=steering, strength=strength, max_tokens=TOKENS, temperature=0
    )
    return {"refused": float(np.mean([refuses(text) for text in made]))}


@click.command()
@click.argument("source")
@click.option("--concept", "concepts", multiple=True, default=CONCEPTS)
@click.option("--setting", "named", multiple=True, help="These settings alone.")
@click.option("--answers", default=1, show_default=True, help="To each question in the chat.")
@click.option("--xstest", type=click.Path(path_type=Path, exists=True), help="Measure refusal, on this file.")
@click.option("--backend", type=click.Choice(["mlx", "torch"]), default="mlx", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
def main(
    source: str,
    concepts: tuple[str, ...],
    named: tuple[str, ...],
    answers: int,
    xstest: Path | None,
    backend: Literal["mlx", "torch"],
    dtype: str,
) -> None:
    model: Any = mlx_lqr.load(source, backend=backend, dtype=dtype)
    texts = Texts.of(model)
    rows: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for concept in concepts if xstest is None else ["refusal"]:
        made = steerings(model, concept)
        if unknown := [name for name in named if name not in made]:
            raise click.BadParameter(f"there is no setting {unknown[0]!r}; there are: {', '.join(made)}")
        for name in named or made:
            steering = made[name]
            strength, divergence = at_normal(model, texts, steering)
            if xstest is None:
                had = written(model, concept, steering, strength, answers)
            else:
                had = refused(model, steering, strength, xstest)
            found = {"KL": divergence, **had}
            rows.setdefault((name,), []).append(found)
            print(concept, name, f"strength {strength:.3g}", found, flush=True)
    print_means(("setting",), rows)


if __name__ == "__main__":
    main()
