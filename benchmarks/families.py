"""Which architectures of mlx-lm can be steered, tried on tiny models with random weights.

    python benchmarks/families.py                         # every architecture of the mlx-lm that is installed
    python benchmarks/families.py configs.json            # {name: config.json} of your own
    python benchmarks/families.py --only qwen3_next --only gpt_oss
    make families                                         # write docs/families.md

Every model is written to a folder, loaded from it, fitted with both costs, steered, decoded in a batch and in a chat.
A column says "yes", or why not. The last two are relative errors against differences of mlx-lm's whole model: of single
A_k, and of the product of all.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers import tiny_architectures
from helpers.survey import STEPS, tried, written

from mlx_lqr.backends.mlx.measured_model import MeasuredModel
from mlx_lqr.errors import first_line
from mlx_lqr.files.atomic import writing

PAGE = """# Every architecture of mlx-lm

Made by `make families` on {date}, with mlx-lm {mlx_lm} and MLX {mlx}, on a CPU. Each row is a tiny model with random
weights and every kind of layer that the family has. It was loaded from a folder, fitted with both costs, steered,
decoded in a batch and in a chat: {works} of {all} work. A batch has the tokens of each prompt alone, a chat those of
the conversation decoded anew.

The errors are relative to differences of mlx-lm's own forward pass: of A<sub>k</sub>, the worst block, and of the
product of all A<sub>k</sub>. [What they mean](models.md#other-architectures-on-mlx). Rows without them are of families
that run on both backends, whose derivatives have tests of their own. A batch is decoded in one pass (together) or a
prompt at a time.

{table}

## Refused

{refused}

{without}
"""
"""docs/families.md."""


@dataclass(frozen=True)
class Row:
    """One architecture."""

    steps: dict[str, str]
    """Step -> "yes", or why not."""
    seconds: float
    batch: str = ""
    jacobian: str = ""
    chain: str = ""

    @property
    def works(self) -> bool:
        return all(self.steps.get(step) == "yes" for step in STEPS)

    @property
    def reason(self) -> str:
        return next(text for text in self.steps.values() if text != "yes")


def row_of(config: dict[str, Any]) -> Row:
    """What came of one configuration."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        os.environ["MLX_LQR_CACHE"] = str(Path(place) / "cache")
        try:
            folder = written(config, Path(place) / "model")
        except (Exception, SystemExit) as error:
            why = first_line(error) if isinstance(error, Exception) else f"its module ends the process ({error})"
            return Row({"load": f"mlx-lm makes no model of this: {why}"}, time.perf_counter() - start)
        trial = tried(folder)
    measured, seconds = trial.model, time.perf_counter() - start
    if not isinstance(measured, MeasuredModel):
        return Row(trial.steps, seconds, "together" if trial.works else "")
    errors = measured.measurement
    batch = "together" if errors.merges else "one by one"
    return Row(trial.steps, seconds, batch, f"{errors.jacobian:.0e}", f"{errors.chain:.0e}")


def rows_of(configs: dict[str, dict[str, Any]], jobs: int) -> Iterator[tuple[str, Row]]:
    """Each configuration with its row, in their order; a process that dies is a row too."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    pool = partial(ProcessPoolExecutor, mp_context=get_context("spawn"))
    with pool(jobs) as several:
        futures = {name: several.submit(row_of, config) for name, config in configs.items()}
        for name, future in futures.items():
            row = _result(future)
            if row is None:  # this process or one beside it died
                with pool(1) as alone:
                    row = _result(alone.submit(row_of, configs[name]))
            yield name, row or Row({"load": "CRASH: the process died"}, 0.0)


def _result(future: Future[Row]) -> Row | None:
    try:
        return future.result()
    except BrokenProcessPool:
        return None


def markdown(rows: dict[str, Row]) -> str:
    """The page of the documentation."""
    table = ["| architecture | batch | error of A<sub>k</sub> | of their product |", "|---|---|---|---|"]
    for name, row in rows.items():
        if row.works:
            table.append(f"| {name} | {row.batch} | {row.jacobian} | {row.chain} |")
    refused = ["| architecture | why |", "|---|---|"]
    refused += [f"| {name} | {said(row.reason)} |" for name, row in rows.items() if not row.works]
    without = [f"No tiny model is made of {name}: {why}." for name, why in tiny_architectures.WITHOUT.items()]
    return PAGE.format(
        date=date.today(),
        mlx_lm=metadata.version("mlx-lm"),
        mlx=metadata.version("mlx"),
        works=sum(row.works for row in rows.values()),
        all=len(rows),
        table="\n".join(table),
        refused="\n".join(refused),
        without="\n".join(without),
    )


def said(reason: str) -> str:
    """A refusal without what all of them say."""
    return re.sub(r"^refused: (models of the type .* cannot be steered: )?|: use another model$", "", reason)


@click.command(help=__doc__)
@click.argument("configs", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("--only", multiple=True, help="The configurations to try; by default all.")
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, help="Processes; by default one a core.")
@click.option("--markdown", "page", type=click.Path(dir_okay=False, path_type=Path), help="The page to write.")
def main(configs: Path | None, only: tuple[str, ...], jobs: int, page: Path | None) -> None:
    if configs is None:
        table = {name: tiny_architectures.tiny_config(name) for name in only or tiny_architectures.architectures()}
    else:
        table = json.loads(configs.read_text("utf-8"))
        table = {name: table[name] for name in only or table}
    rows: dict[str, Row] = {}
    for name, row in rows_of(table, jobs):
        rows[name] = row
        cells = [*(row.steps.get(step, "") for step in STEPS), row.batch, row.jacobian, row.chain]
        print("|", " | ".join([name, *cells, f"{row.seconds:.1f} s"]), "|", flush=True)
    for step in STEPS:
        print(f"{step}: {sum(row.steps.get(step) == 'yes' for row in rows.values())} of {len(rows)}")
    if page is not None:
        with writing(page) as temporary:
            temporary.write_text(markdown(rows), "utf-8")


if __name__ == "__main__":
    main()
