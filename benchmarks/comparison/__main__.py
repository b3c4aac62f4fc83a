"""Measure the methods on two small models, then write docs/comparison.md from what was measured.

    python -m benchmarks.comparison run --model smollm2 --smollm2 DIR --gemma DIR --data DIR -o OUT
    python -m benchmarks.comparison run --model gemma --smollm2 DIR --gemma DIR --data DIR -o OUT
    python -m benchmarks.comparison page -o OUT

From the checkout's root. The two runs may go side by side, one thread each (OMP_NUM_THREADS=1), and each goes on where
it was interrupted; methods that were changed since need another OUT. One experiment is finished before the next begins,
those first that matter most, so that `page` has something to write at any time. Models are converted folders
(`mlx-lqr convert`); the data folder holds realtoxicityprompts.jsonl, truthfulqa.jsonl and xstest.jsonl. `--quick`
measures hardly anything, to see that all of it runs; `--limit-rows` measures less of everything, `--normal-only` one
budget of damage instead of three. Processors that multiply in bfloat16 take less than half the time with `--backend
torch --dtype bfloat16`, for the same numbers within their intervals. A result has the methods of its last run, so that
`--method` leaves out the others even where their rows are there. Where A-LQR alone has changed, `--choices
benchmarks/comparison/results` takes from the results that are there which setting of each other method was chosen, and
its strengths, and measures the rest anew; `--kept` of the same folder measures A-LQR alone, and compares it with what
the others reached there, prompt by prompt.

`page` first copies the results of OUT, which are small, to benchmarks/comparison/results; without -o it writes the page
from those that are there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Literal

import click

import mlx_lqr  # first, so that MLX gets its BLAS

# isort: split
from benchmarks.comparison.ablation import ablate
from benchmarks.comparison.experiments import EXPERIMENTS
from benchmarks.comparison.measure import collect, measure
from benchmarks.comparison.methods import CHOSEN_AT, METHODS
from benchmarks.comparison.page import ABLATION, write_page
from benchmarks.comparison.setting import FULL, QUICK, Setting
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.strength import BUDGETS

BACKEND = click.option(
    "--backend", type=click.Choice(["mlx", "torch"]), default="mlx", show_default=True, help="What computes."
)
DTYPE = click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True, help="In what."
)
MODELS = ("smollm2", "gemma")
FOLDER = click.Path(path_type=Path, file_okay=False)
KNOWN = click.Path(path_type=Path, file_okay=False, exists=True)
RESULTS = Path(__file__).with_name("results")


class _Group(click.Group):
    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except InputError as error:
            failure = click.ClickException(str(error))
            failure.exit_code = 2
            raise failure from None


@click.group(cls=_Group, help=__doc__.splitlines()[0])
def main() -> None: ...


@main.command()
@click.option("--model", "chosen", type=click.Choice(MODELS), required=True, help="The one to steer; the other judges.")
@click.option("--smollm2", required=True, metavar="PATH", help="SmolLM2-135M-Instruct.")
@click.option("--gemma", required=True, metavar="PATH", help="Gemma 3 270M, the base model.")
@click.option("--data", required=True, type=FOLDER, help="The evaluation data.")
@click.option("-o", "--output", required=True, type=FOLDER, help="Rows and results go here.")
@click.option("--only", multiple=True, type=click.Choice([one.name for one in EXPERIMENTS]), help="These experiments.")
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), help="These methods.")
@click.option("--limit-rows", type=click.IntRange(min=1), metavar="N", help="Report N rows, and less of all else.")
@click.option("--normal-only", is_flag=True, help="At the normal budget of damage alone.")
@click.option("--choices", type=KNOWN, metavar="DIR", help="Earlier results that tell the others' settings.")
@click.option("--kept", type=KNOWN, metavar="DIR", help="Earlier results; A-LQR alone is measured anew.")
@click.option("--quick", is_flag=True, help="Hardly any rows.")
@BACKEND
@DTYPE
def run(
    chosen: str,
    smollm2: str,
    gemma: str,
    data: Path,
    output: Path,
    only: tuple[str, ...],
    methods: tuple[str, ...],
    limit_rows: int | None,
    normal_only: bool,
    choices: Path | None,
    kept: Path | None,
    quick: bool,
    backend: Literal["mlx", "torch"],
    dtype: str,
) -> None:
    """Fit, calibrate and report every method on one model."""
    sources = {"smollm2": smollm2, "gemma": gemma}
    loaded = {name: mlx_lqr.load(source, backend=backend, dtype=dtype) for name, source in sources.items()}
    model = loaded.pop(chosen)
    (judge,) = loaded.values()
    started = time.monotonic()

    def say(stage: str, done: int, total: int) -> None:
        print(f"[{time.monotonic() - started:6.0f} s] {chosen}, {stage}", file=sys.stderr, flush=True)

    sizes = QUICK if quick else FULL
    sizes = sizes if limit_rows is None else sizes.limited(limit_rows)
    budgets = {CHOSEN_AT: BUDGETS[CHOSEN_AT]} if normal_only else BUDGETS
    earlier = [folder / chosen if folder is not None else None for folder in (choices, kept)]
    setting = Setting(model, judge, data, output / chosen, sizes, dtype, say, budgets, *earlier)
    for experiment in EXPERIMENTS:
        if (only and experiment.name not in only) or (experiment.chat and not setting.chat):
            continue
        measure(experiment, setting, methods or METHODS)


@main.command()
@click.option("--smollm2", required=True, metavar="PATH", help="SmolLM2-135M-Instruct.")
@click.option("--gemma", required=True, metavar="PATH", help="Gemma 3 270M, the base model.")
@click.option("-o", "--output", default=RESULTS / ABLATION, type=click.Path(path_type=Path), help="The result.")
@BACKEND
@DTYPE
def ablation(smollm2: str, gemma: str, output: Path, backend: Literal["mlx", "torch"], dtype: str) -> None:
    """Measure what each part of A-LQR's recipe is worth."""
    sources = {"SmolLM2": smollm2, "Gemma": gemma}
    models = {name: mlx_lqr.load(source, backend=backend, dtype=dtype) for name, source in sources.items()}
    print(f"Wrote {ablate(models, output, lambda stage: print(stage, file=sys.stderr, flush=True))}")


@main.command()
@click.option("-o", "--output", type=FOLDER, help="What the runs have written.")
@click.option("--results", default=RESULTS, type=FOLDER, help="Where results are kept.")
@click.option("--docs", default=Path("docs"), show_default=True, type=FOLDER, help="Where the page goes.")
def page(output: Path | None, results: Path, docs: Path) -> None:
    """Write the page and its pictures from the results of both models."""
    if output is not None:
        collect(output, results)
    print(f"Wrote {write_page(results, docs)}")


if __name__ == "__main__":
    main()
