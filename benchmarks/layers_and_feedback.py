"""How often texts and answers that a model writes have the concept, by A-LQR's layers, feedback and push.

    python benchmarks/layers_and_feedback.py MODEL --backend torch --dtype bfloat16
    python benchmarks/layers_and_feedback.py MODEL --backend torch --dtype bfloat16 --xstest xstest.jsonl
    python benchmarks/layers_and_feedback.py MODEL --backend torch --dtype bfloat16 --truthfulqa truthfulqa.jsonl

The ablation of docs/comparison.md reads probabilities off texts of the unsteered model. What a model writes reads its
own words again, and can rank settings otherwise. Openings and questions are those for tuning, and every setting is at
the strength where the divergence of `calibrate` reaches the normal budget. Adding the mean difference (actadd), to the
last third of the layers and to those that `fit` takes, stands beside them. With --xstest it is refusal, and the share
of the unsafe requests for tuning that are refused; with --truthfulqa truthfulness, and MC2 of questions for tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import click
import numpy as np
from comparison.split import part_of, right_and_wrong, rows_in, write_rows
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
QUESTIONS, PROMPTS = 128, 70
"""Of TruthfulQA, to ask, and to fit on of each side"""
CLOSE = 0.8
"""Of the best layer, where `fit` takes a third"""
OWN = "fit's own"


def steerings(model: Model, concept: str, texts: tuple[Sequence[Prompt], Sequence[Prompt]]) -> Mapping[str, Steering]:
    """What is measured, by name."""
    sets = framed(model, texts)
    contrast, jacobians = mlx_lqr.contrast(model, *sets), mlx_lqr.linearize(model, sets[0][:JACOBIAN_PROMPTS])
    T = model.num_layers
    third, middle = range(2 * T // 3, T), range(T // 3, 2 * T // 3)
    close = choose_layers("auto", contrast, jacobians, least=CLOSE)
    settings: dict[str, dict[str, Any]] = {
        OWN: {},
        "fit's own with a tenth of the feedback": {"feedback": 0.1},
        "fit's own with a hundredth": {"feedback": 0.01},
        "fit's own, all layers": {"layers": "all"},
        "fit's own, the middle third": {"layers": middle},
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


def truthful(model: Model, steering: Steering, strength: float, truthfulqa: Path) -> dict[str, float]:
    """MC2 of questions that the comparison tunes by, without solved examples."""
    with TemporaryDirectory() as folder:
        file = write_rows(Path(folder) / "rows.jsonl", rows_in(truthfulqa, "question", "tune", limit=QUESTIONS))
        task = tasks.truthfulness(file, examples=0, chat=model.tokenizer.has_chat_template)
        task = replace(task, parts=task.parts[:1])  # the choices
        evaluation = tasks.evaluate(model, task, tasks.NamedSteering("one", steering), [strength])
    return {"mc2": evaluation.results()[0].metrics["mc2"].value}


@click.command()
@click.argument("source")
@click.option("--concept", "concepts", multiple=True, default=CONCEPTS)
@click.option("--setting", "named", multiple=True, help="These settings alone.")
@click.option(
    "--answers", type=click.IntRange(min=1), default=1, show_default=True, help="To each question in the chat."
)
@click.option("--xstest", type=click.Path(path_type=Path, exists=True), help="Measure refusal, on this file.")
@click.option("--truthfulqa", type=click.Path(path_type=Path, exists=True), help="Measure truthfulness, on this file.")
@click.option("--backend", type=click.Choice(["mlx", "torch"]), default="mlx", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
def main(
    source: str,
    concepts: tuple[str, ...],
    named: tuple[str, ...],
    answers: int,
    xstest: Path | None,
    truthfulqa: Path | None,
    backend: Literal["mlx", "torch"],
    dtype: str,
) -> None:
    if xstest is not None and truthfulqa is not None:
        raise click.UsageError("--xstest and --truthfulqa are two measurements: give one of them")
    model: Any = mlx_lqr.load(source, backend=backend, dtype=dtype)
    texts = Texts.of(model)
    rows: dict[tuple[str, ...], list[dict[str, float]]] = {}

    def measured(concept: str, steering: Steering, strength: float) -> dict[str, float]:
        if truthfulqa is not None:
            return truthful(model, steering, strength, truthfulqa)
        if xstest is not None:
            return refused(model, steering, strength, xstest)
        return written(model, concept, steering, strength, answers)

    if truthfulqa is not None or xstest is not None:
        concepts = ("truthfulness",) if truthfulqa is not None else ("refusal",)
    for concept in concepts:
        if truthfulqa is not None:
            sets = right_and_wrong(rows_in(truthfulqa, "question", "fit", limit=PROMPTS))
        else:
            sets = mlx_lqr.bundled_prompts(concept)
        made = steerings(model, concept, sets)
        if unknown := [name for name in named if name not in made]:
            raise click.BadParameter(f"there is no setting {unknown[0]!r}; there are: {', '.join(made)}")
        for name in named or made:
            strength, divergence = at_normal(model, texts, made[name])
            found = {"KL": divergence, **measured(concept, made[name], strength)}
            rows.setdefault((name,), []).append(found)
            print(concept, name, f"strength {strength:.3g}", found, flush=True)
    print_means(("setting",), rows)


if __name__ == "__main__":
    main()
