"""A task's files: JSON lines that the user names, checked before anything is run, and the bundled texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Literal

from mlx_lqr.errors import InputError
from mlx_lqr.files.text import is_unicode, parse_object, read_lines, text_lines
from mlx_lqr.tasks.records import Row

Kind = Literal["text", "texts"]
_NAMES: dict[Kind, str] = {"text": "text", "texts": "a list of texts"}


def read_rows(path: str | PathLike[str], keys: Mapping[str, Kind], limit: int | None = None) -> list[Row]:
    """The rows of a file, or `limit` of them spread evenly over it. Blank lines are skipped.

    Args:
        path: JSON lines.
        keys: the keys that every row must have: "text" is a text that is not empty, "texts" a list of at least one.
        limit: how many rows to return; the whole file is checked in any case.

    Raises:
        InputError: the file cannot be read, or a row is not like this; the message names the line.
    """
    file = Path(path)
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, not {limit}")
    rows = [_row(file, number, line, keys) for number, line in read_lines(file)]
    if not rows:
        raise InputError(f"{file} has no rows")
    return rows if limit is None else spread(rows, limit)


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """`count` of the rows (or all, if there are fewer), evenly spaced, since files are often sorted by kind."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def bundled_text(name: str) -> str:
    """The text of a bundled file."""
    return resources.files("mlx_lqr.tasks.bundled").joinpath(name).read_text("utf-8")


def bundled_lines(name: str) -> list[str]:
    """The lines of a bundled file."""
    return text_lines(bundled_text(name))


def _row(file: Path, number: int, line: str, keys: Mapping[str, Kind]) -> Row:
    row = parse_object(line)
    if row is None:
        raise InputError(f"{file}, line {number}: expected a JSON object with the keys {', '.join(keys)}")
    for key, kind in keys.items():
        value = row.get(key)
        texts = value if kind == "texts" else [value]
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise InputError(f'{file}, line {number}: "{key}" must be {_NAMES[kind]}')
        if not all(map(is_unicode, texts)):
            raise InputError(f'{file}, line {number}: "{key}" has half a surrogate pair, which is no character')
    return row
