"""The one way to print a line of text; tables have their own (tables.py), of cells that come through `printable`."""

from __future__ import annotations

import sys
from typing import IO

import click

from mlx_lqr.runtime.streams import is_terminal, printable


def say(text: str = "", *, err: bool = False, nl: bool = True, bold: bool = False, file: IO[str] | None = None) -> None:
    """Print a text, wherever it comes from: nothing in it makes a terminal do anything but show it.

    Args:
        err: on stderr.
        nl: with the end of its line.
        bold: where a terminal can show that.
        file: a stream in place of stdout and stderr.
    """
    stream = file if file is not None else sys.stderr if err else sys.stdout
    shown = printable(text, stream)
    if bold and is_terminal(stream):
        click.echo(click.style(shown, bold=True), err=err, nl=nl, file=file)
    else:  # color: or click would leave out what looks like commands, in a pipe too
        click.echo(shown, err=err, nl=nl, file=file, color=True)
