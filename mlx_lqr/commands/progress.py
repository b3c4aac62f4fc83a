"""Long work on a terminal: a progress bar on stderr for every stage, and what Ctrl-C leaves behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

from mlx_lqr.backends.protocol import Progress
from mlx_lqr.runtime.streams import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

NOTHING_WRITTEN = "Nothing was written."


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A progress bar on stderr for every stage that is reported."""
    with ExitStack() as stack:
        bars: Bars | None = None
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            nonlocal bars
            if bars is None:  # rich takes a tenth of a second to import, and often there is nothing to report
                bars = stack.enter_context(_bars())
            if stage not in tasks:
                tasks[stage] = bars.add_task(printable(stage, sys.stderr), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Bars(*columns, console=Console(stderr=True))


@contextmanager
def stopping(message: str) -> Iterator[None]:
    """Say this when Ctrl-C ends the work: what became of it."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Stopped. {message}") from None


def going_on_later() -> AbstractContextManager[None]:
    """Say, when Ctrl-C ends the work, that what is finished is kept."""
    return stopping("The same command goes on from here.")
