"""The one way to print a table: drawn on a terminal, and aligned columns in a pipe."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Collection, Sequence

from mlx_lqr.commands.output import say
from mlx_lqr.runtime.streams import printable
from mlx_lqr.tasks import Estimate

UNLIMITED = 10_000
"""Characters, wider than any table"""
LEAST_MEANING = 30
"""Characters of a line, for the second column of `show_definitions`"""


def show_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Collection[int] = (0,),
    title: str | None = None,
    dim: Collection[int] = (),
) -> None:
    """Print rows of cells under their heads.

    Args:
        head: of each column.
        rows: as many cells each as there are columns.
        left: columns of words, which are aligned to the left; numbers are aligned to the right.
        title: a line above.
        dim: rows that a terminal shows in grey.
    """
    if sys.stdout.isatty():
        shown = [[printable(cell, sys.stdout) for cell in row] for row in (head, *rows)]
        _draw(shown[0], shown[1:], left, title and printable(title, sys.stdout), dim)
        return
    if title is not None:
        say(title)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say("  ".join(cells).rstrip())


def _draw(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Collection[int],
    title: str | None,
    dim: Collection[int],
) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    columns = [
        Column(Text(name), justify="left" if i in left else "right", overflow="fold") for i, name in enumerate(head)
    ]
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title and Text(title))
    table.title_justify = "left"
    for i, row in enumerate(rows):
        table.add_row(*map(Text, row), style="dim" if i in dim else None)
    console = Console(highlight=False)
    needed = console.measure(table, options=console.options.update(max_width=UNLIMITED)).minimum
    console.width = max(console.width, needed)  # cells are folded at spaces, never within a number
    console.print(table)


def show_definitions(rows: Sequence[tuple[str, str]], width: int, *, indent: int = 0) -> None:
    """Print names and what they mean on stderr, in two columns, or below one another where these would be narrow.

    Args:
        rows: name and meaning.
        width: of the terminal.
        indent: spaces before each name.
    """
    column = indent + max(len(name) for name, _ in rows) + 2
    beside = width - column >= LEAST_MEANING
    for name, meaning in rows:
        margin = " " * (column if beside else indent + 4)
        lines = textwrap.wrap(meaning, max(LEAST_MEANING, width), initial_indent=margin, subsequent_indent=margin)
        if beside and lines:
            lines[0] = " " * indent + name.ljust(column - indent) + lines[0][column:]
        else:
            say(" " * indent + name, err=True)
        for line in lines:
            say(line, err=True)


def cell(estimate: Estimate) -> str:
    """A number and its interval."""
    return f"{_number(estimate.value)} ({_number(estimate.low)} to {_number(estimate.high)})"


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
