"""Measure the methods on two small models, then write docs/comparison.md from what was measured.

    python -m benchmarks.comparison run --model smollm2 --smollm2 DIR --gemma DIR --data DIR -o OUT
    python -m benchmarks.comparison run --model gemma --smollm2 DIR --gemma DIR --data DIR -o OUT
    python -m benchmarks.comparison page -o OUT

From the checkout's root. The two runs may go side by side, one thread each (OMP_NUM_THREADS=1), and each goes on where
it was interrupted. Models are converted folders (`mlx-lqr convert`); the data folder holds realtoxicityprompts.jsonl,
truthfulqa.jsonl and xstest.jsonl. `--quick` measures hardly anything, to see that all of it runs.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

import mlx_lqr  # first, so that MLX gets its BLAS
from mlx_lqr import tasks

# isort: split
from benchmarks.comparison.experiments import EXPERIMENTS, FULL, QUICK, Setting
from benchmarks.comparison.measure import measure
from benchmarks.comparison.methods import METHODS
from benchmarks.comparison.page import write_page

DTYPE = "float32"
MODELS = ("smollm2", "gemma")
FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group(help=__doc__.splitlines()[0])
def main() -> None: ...


@main.command()
@click.option("--model", "chosen", type=click.Choice(MODELS), required=True, help="The one to steer; the other judges.")
@click.option("--smollm2", required=True, metavar="PATH", help="SmolLM2-135M-Instruct.")
@click.option("--gemma", required=True, metavar="PATH", help="Gemma 3 270M, the base model.")
@click.option("--data", required=True, type=FOLDER, help="The evaluation data.")
@click.option("-o", "--output", required=True, type=FOLDER, help="Rows and results go here.")
@click.option("--only", multiple=True, type=click.Choice([one.name for one in EXPERIMENTS]), help="These experiments.")
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), help="These methods.")
@click.option("--quick", is_flag=True, help="Hardly any rows.")
def run(
    chosen: str,
    smollm2: str,
    gemma: str,
    data: Path,
    output: Path,
    only: tuple[str, ...],
    methods: tuple[str, ...],
    quick: bool,
) -> None:
    """Fit, tune and report every method on one model."""
    sources = {"smollm2": smollm2, "gemma": gemma}
    loaded = {name: mlx_lqr.load(source, dtype=DTYPE) for name, source in sources.items()}
    model = loaded.pop(chosen)
    judge = tasks.Judge(next(iter(loaded.values())))
    started = time.monotonic()

    def say(stage: str, done: int, total: int) -> None:
        if not total:
            print(f"[{time.monotonic() - started:6.0f} s] {chosen}, {stage}", file=sys.stderr, flush=True)

    for experiment in EXPERIMENTS:
        if (only and experiment.name not in only) or (experiment.chat and not model.tokenizer.has_chat_template):
            continue
        folder = output / chosen / experiment.name
        setting = Setting(model, judge, data, folder / "rows", QUICK if quick else FULL)
        measure(experiment, setting, folder, methods=methods or METHODS, loading={"dtype": DTYPE}, progress=say)


@main.command()
@click.option("-o", "--output", required=True, type=FOLDER, help="What the runs have written.")
@click.option("--docs", default=Path("docs"), show_default=True, type=FOLDER, help="Where the page goes.")
def page(output: Path, docs: Path) -> None:
    """Write the page and its pictures from the results of both models."""
    print(f"Wrote {write_page(output, docs)}")


if __name__ == "__main__":
    main()
