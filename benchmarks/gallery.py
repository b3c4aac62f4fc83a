"""Every bundled concept as `fit` makes it: what it does to a chat at the recommended strength, and what that costs.

    python benchmarks/gallery.py demo -o gallery

Each set is fitted and calibrated as the command does it, then asked the chat task's reported questions, which nothing
was fitted or chosen on. Writes docs/gallery.md: a table of all sets, and the answers of five of them to the first six
open questions as they came. What is in the output folder is not measured again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

import mlx_lqr  # first, so that MLX gets its BLAS

# isort: split
from mlx_lqr import tasks
from mlx_lqr.backends.protocol import Model
from mlx_lqr.files.atomic import writing
from mlx_lqr.lqr.concept_prompts import framed
from mlx_lqr.lqr.strength import BUDGETS
from mlx_lqr.methods.steering import Steering, load_steering
from mlx_lqr.tasks.bootstrap import Estimate
from mlx_lqr.tasks.generations import chat_prompt

SHOWN = ("ocean", "dog", "music", "winter", "football")
ANSWERS, SHOWN_TOKENS = 6, 120
QUESTIONS = 20
"""Open ones and factual ones, for each concept"""
DECODING = tasks.Decoding(max_tokens=40, seed=1)
HEAD = """# Gallery

Every bundled concept (`mlx-lqr concepts`) on {model}, fitted by `mlx-lqr fit demo --concept NAME -o FILE` with
nothing else said, and asked by `-c FILE` at the strength that the file recommends: {questions} open and {questions}
factual questions in the chat template, which nothing was fitted or chosen on. *In answers* is the share of answers to
open questions with a word of the concept's family (styles have words that mark them); *facts* the share of factual
questions answered rightly, {facts:.2f} unsteered; *perplexity* that of the answers under the unsteered model, times
that of its own answers. With so few questions a share is known to about 0.1. `python benchmarks/gallery.py demo -o DIR`
measures it all and writes this page{how}."""


@click.command()
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="Rows and files.")
@click.option("--docs", default=Path("docs"), show_default=True, type=click.Path(path_type=Path), help="For the page.")
@click.option("--concept", "concepts", multiple=True, help="These alone, without the page.")
@click.option("--backend", type=click.Choice(["mlx", "torch"]), default="mlx", show_default=True, help="What computes.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True, help="In what."
)
def main(
    model: str, output: Path, docs: Path, concepts: Sequence[str], backend: Literal["mlx", "torch"], dtype: str
) -> None:
    loaded = mlx_lqr.load(model, backend=backend, dtype=dtype)
    how = "" if (backend, dtype) == ("mlx", "float32") else f", here with `--backend {backend} --dtype {dtype}`"
    lines, answers, head = [], [], ""
    for concept in concepts or mlx_lqr.bundled_concepts():
        steering = _fitted(loaded, concept, output / f"{concept}.safetensors")
        (strength,) = steering.strength or (1.0,)
        task = tasks.chat(tasks.word_family(concept), limit=QUESTIONS, decoding=DECODING)
        rows = output / f"{concept}.jsonl"
        run = tasks.evaluate(loaded, task, tasks.NamedSteering(concept, steering), [0.0, strength], output=rows)
        before, after = (result.metrics for result in run.results())
        head = HEAD.format(model=loaded.name, questions=QUESTIONS, how=how, facts=before["accuracy"].value)
        lines.append(_line(concept, steering, strength, before, after))
        click.echo(lines[-1])
        if concept in SHOWN:
            questions = [row["prompt"] for row in run.rows[strength]["answers"][:ANSWERS]]
            answers.append(_answers(loaded, steering, strength, questions))
    if concepts:
        return
    with writing(docs / "gallery.md") as temporary:
        temporary.write_text("\n\n".join([head, _table(lines), _shown(answers)]) + "\n", "utf-8")


def _fitted(model: Model, concept: str, file: Path) -> Steering:
    """As `mlx-lqr fit` does it."""
    if file.is_file():
        return load_steering(file)
    controller = mlx_lqr.fit(model, *framed(model, mlx_lqr.bundled_prompts(concept)), concept=concept)
    calibrated = controller.calibrated(mlx_lqr.calibrate(model, controller))
    file.parent.mkdir(parents=True, exist_ok=True)
    calibrated.save(file)
    return calibrated


def _answers(model: Model, steering: Steering, strength: float, questions: Sequence[str]) -> str:
    """What a chat answers, as a part of the page."""
    texts = mlx_lqr.batch_generate(
        model,
        [chat_prompt(model, question) for question in questions],
        controller=steering,
        strength=strength,
        max_tokens=SHOWN_TOKENS,
        seed=DECODING.seed,
    )
    rows = "\n".join(f"| {question} | {_cell(text)} |" for question, text in zip(questions, texts, strict=True))
    (concept,) = steering.concepts
    return f"### {concept}, strength {strength:g}\n\n| question | answer |\n|---|---|\n{rows}"


def _line(
    concept: str, steering: Steering, strength: float, before: dict[str, Estimate], after: dict[str, Estimate]
) -> str:
    active = steering.active_layers
    layers = f"{active[0]} to {active[-1]}" if len(active) > 1 else str(active[0])
    (calibration,) = steering.calibration
    budgets = "" if calibration is None else ", ".join(f"{calibration.strength[budget]:.2g}" for budget in BUDGETS)
    share = f"{before['prevalence'].value:.2f} -> {after['prevalence'].value:.2f}"
    ratio = after["perplexity"].value / before["perplexity"].value
    return f"| {concept} | {layers} | {budgets} | {share} | {after['accuracy'].value:.2f} | {ratio:.2f} |"


def _table(lines: Sequence[str]) -> str:
    head = f"| concept | layers | strengths ({', '.join(BUDGETS)}) | in answers | facts | perplexity |"
    return "\n".join([head, "|---|---|---|---|---|---|", *lines])


def _shown(answers: Sequence[str]) -> str:
    count = len(answers) * ANSWERS
    said = (
        f"## {count} answers, as they came\n\nThe first {ANSWERS} open questions, seed {DECODING.seed}, "
        f"{SHOWN_TOKENS} tokens at most, so that long answers end in the middle."
    )
    return "\n\n".join([said, *answers])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    main()
