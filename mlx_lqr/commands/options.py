"""What several commands share: how controllers and layers are written, and how long work is shown."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, TypedDict, get_args

import click

from mlx_lqr.backends.protocol import Progress
from mlx_lqr.errors import InputError
from mlx_lqr.loading import BackendName
from mlx_lqr.runtime.decode import Overflow

model_argument = click.argument("model")
NOTHING_WRITTEN = "Nothing was written."


class Loading(TypedDict):
    """How a command loads its model, by the names of `mlx_lqr.load`."""

    backend: BackendName
    device: str | None
    dtype: str | None


def loading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options for how the model is loaded, which the command gets as one argument `loading`."""

    @click.option(
        "--backend",
        type=click.Choice(get_args(BackendName)),
        default="auto",
        show_default=True,
        help="auto takes MLX on Metal, torch on CUDA, and MLX on a bare CPU.",
    )
    @click.option("--device", help="cpu, cuda or cuda:NUMBER, for torch; by default a GPU where there is one.")
    @click.option(
        "--dtype",
        help="float32, float16 or bfloat16; by default the checkpoint's own on a GPU and float32 on the CPU.",
    )
    @functools.wraps(command)
    def collected(*, backend: BackendName, device: str | None, dtype: str | None, **others: Any) -> Any:
        return command(loading=Loading(backend=backend, device=device, dtype=dtype), **others)

    return collected


controller_option = click.option(
    "-c",
    "--controller",
    "controllers",
    multiple=True,
    metavar="FILE[:STRENGTH]",
    help="Steer with this controller; repeat it for several concepts. STRENGTH is by default what the file "
    "recommends (see `mlx-lqr tune`), or 1.",
)
strengths_option = click.option(
    "--strengths", default="1,2,3", show_default=True, help="At which to run the controller, separated by commas."
)
force_option = click.option("--force", is_flag=True, help="Replace a file of another kind, too, at the output.")
adaptive_option = click.option(
    "--adaptive/--stored",
    default=None,
    help="Compute the gains anew at the very prompt, or take the stored ones; by default what the file was fitted for.",
)


def decoding_options(max_tokens: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options of `mlx_lqr.Options` that are plain values, under the same names; `stop` is a tuple."""
    made = (
        click.option("-n", "--max-tokens", default=max_tokens, show_default=True, help="Tokens at most."),
        click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token each time."),
        click.option(
            "--top-p", default=1.0, show_default=True, help="Sample from the likeliest tokens that make this."
        ),
        click.option("--top-k", default=0, show_default=True, help="Sample from this many tokens; 0 from all."),
        click.option("--min-p", default=0.0, show_default=True, help="Least probability, relative to the likeliest."),
        click.option(
            "--repetition-penalty", default=1.0, show_default=True, help="Above 1, tokens seen before get rarer."
        ),
        click.option("--seed", type=int, help="Makes sampling repeatable."),
        click.option(
            "--stop", multiple=True, metavar="TEXT", help="Ends the answer, without being part of it; repeat."
        ),
        click.option(
            "--overflow",
            type=click.Choice(get_args(Overflow)),
            default="error",
            show_default=True,
            help="Where the context is full: refuse, or roll on without the oldest tokens.",
        ),
    )

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(made):
            command = option(command)
        return command

    return decorate


MOST_LAYERS = 10_000
"""More than any model has, and few enough to list."""


def parse_layers(text: str | None) -> list[int] | Literal["auto", "all"] | None:
    """Layers such as "20-29", "0,4,8-11", "auto" or "all"."""
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if text == "all":
        return "all"
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            found = range(int(first), int(last if dash else first) + 1)
            if len(found) > MOST_LAYERS:
                raise ValueError(part)
            layers.extend(found)
    except (OverflowError, ValueError):
        raise InputError(f"layers must look like 20-29, 0,4,8-11, auto or all, not {text!r}") from None
    return layers


def parse_strengths(text: str) -> list[float]:
    """Strengths such as "0,1.5,3"."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"strengths must look like 1,2,3, not {text!r}") from None
    if not all(math.isfinite(strength) for strength in found):
        raise InputError(f"strengths must be finite numbers, not {text!r}")
    return found


def plots_or_refusal() -> Any:
    """The module that draws, refused before long work where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib: pip install 'mlx-lqr[plots]', or leave -o out")
    from mlx_lqr.analysis import plots

    return plots


@contextmanager
def stopping(left: str) -> Iterator[None]:
    """Say, when Ctrl-C ends it, what is left of the work."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Stopped. {left}") from None


def going_on_later() -> AbstractContextManager[None]:
    """Say, when Ctrl-C ends it, that nothing that was finished is lost."""
    return stopping("The same command goes on from here.")


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A progress bar on stderr for every stage that is reported."""
    with ExitStack() as stack:
        bars: Any = None
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            nonlocal bars
            if bars is None:  # rich takes a tenth of a second, and mostly there is nothing to report
                bars = stack.enter_context(_bars())
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _bars() -> AbstractContextManager[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Bars(*columns, console=Console(stderr=True))
