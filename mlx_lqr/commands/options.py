"""What several commands share: how controllers and layers are written, and how long work is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from mlx_lqr.backends.base import Progress
from mlx_lqr.controller import Controller
from mlx_lqr.errors import InputError

model_argument = click.argument("model")
dtype_option = click.option(
    "--dtype",
    help="float32, float16 or bfloat16; by default the checkpoint's own on a GPU and float32 on the CPU.",
)
controller_option = click.option(
    "-c",
    "--controller",
    "controllers",
    multiple=True,
    metavar="FILE[:STRENGTH]",
    help="Steer with this controller; repeat it for several concepts. STRENGTH is 1 unless given.",
)
adaptive_option = click.option(
    "--adaptive",
    is_flag=True,
    help="Compute the gains anew at the very prompt, instead of the stored ones.",
)


def parse_controller(text: str) -> tuple[Controller, float]:
    """FILE[:STRENGTH]; a file whose own name has a colon is found as well."""
    if Path(text).is_file() or ":" not in text:
        return Controller.load(text), 1.0
    file, _, number = text.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        raise InputError(f"strength must be a number, not {number!r} (write -c FILE:STRENGTH)") from None
    return Controller.load(file), strength


def parse_controllers(texts: tuple[str, ...]) -> tuple[Controller | None, list[float]]:
    """All the -c options as one controller and a strength for each of its concepts."""
    loaded = [parse_controller(text) for text in texts]
    if not loaded:
        return None, []
    strengths = [strength for controller, strength in loaded for _ in controller.concepts]
    return Controller.combine(*(controller for controller, _ in loaded)), strengths


def parse_layers(text: str | None) -> list[int] | None:
    """Layers such as "20-29" or "0,4,8-11"."""
    if text is None:
        return None
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            layers.extend(range(int(first), int(last if dash else first) + 1))
    except ValueError:
        raise InputError(f"layers must look like 20-29 or 0,4,8-11, not {text!r}") from None
    return layers


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A progress bar on stderr for every stage that is reported."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report
