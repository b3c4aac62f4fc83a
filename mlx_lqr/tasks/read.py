"""JSON lines from a path that the user gives, every row checked before anything is run, and the files of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Literal

from mlx_lqr.errors import InputError
from mlx_lqr.files.prompts import is_unicode, parse_object, read_lines, text_lines
from mlx_lqr.tasks.records import Row

Kind = Literal["text", "texts"]
_NAMES: dict[Kind, str] = {"text": "text", "texts": "a list of texts"}


def read_rows(path: str | PathLike[str], keys: Mapping[str, Kind], limit: int | None = None) -> list[Row]:
    """The rows of a file, or `limit` of them spread over it; blank lines do not count.

    Args:
        path: JSON lines.
        keys: what every row must have: "text" that is not empty, or "texts", a list of at least one such.
        limit: the whole file is checked nevertheless.

    Raises:
        InputError: no such file, or a row that is not like this; the line is named.
    """
    file = Path(path)
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, not {limit}")
    rows = [_row(file, number, line, keys) for number, line in read_lines(file)]
    if not rows:
        raise InputError(f"{file} has no rows")
    return rows if limit is None else spread(rows, limit)


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """`count` of the rows, or as many as there are, evenly spaced: files are often sorted by kind."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def bundled_text(name: str) -> str:
    """A file that comes with the tasks."""
    return resources.files("mlx_lqr.tasks.bundled").joinpath(name).read_text("utf-8")


def bundled_lines(name: str) -> list[str]:
    """The lines of such a file."""
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
