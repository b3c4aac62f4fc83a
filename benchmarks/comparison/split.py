"""Which rows a method is fitted on, which it is tuned on, and which are reported: no row is two of these.

A row's part depends on its text alone, by the first byte of the text's SHA-256: below 64 it is fitted on, below 128
it is tuned on, and the rest, half of all, is reported. So a row stays where it is whatever else is in the file, and a
text that stands there twice is in one part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from mlx_lqr.files.atomic import writing
from mlx_lqr.tasks.read import read_rows, spread

Part = Literal["fit", "tune", "report"]
PARTS: tuple[Part, ...] = get_args(Part)
FILES: Mapping[str, str] = {"realtoxicityprompts": "prompt", "truthfulqa": "question", "xstest": "prompt"}
"""The data files, without `.jsonl`, and the key that holds a row's text."""


def part_of(text: str) -> Part:
    """The part that the row with this text belongs to."""
    byte = hashlib.sha256(text.strip().encode()).digest()[0]
    return "fit" if byte < 64 else "tune" if byte < 128 else "report"


def rows_of(folder: Path, name: str, *parts: Part, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of these parts of a data file in their order, or `limit` of them spread over it.

    Raises:
        InputError: no such file, or a row without its text.
    """
    return rows_in(folder / f"{name}.jsonl", FILES[name], *parts, limit=limit)


def rows_in(file: Path, key: str, *parts: Part, limit: int | None = None) -> list[dict[str, Any]]:
    """`rows_of`, of a file whose rows have their text at `key`."""
    rows = [row for row in read_rows(file, {key: "text"}) if part_of(row[key]) in parts]
    return rows if limit is None else spread(rows, limit)


def right_and_wrong(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """TruthfulQA's questions with their best answers, and with their first incorrect ones."""
    return (
        [f"Q: {row['question']}\nA: {row['best_answer'].rstrip('.')}." for row in rows],
        [f"Q: {row['question']}\nA: {row['incorrect_answers'][0].rstrip('.')}." for row in rows],
    )


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """The rows as a file that tasks read."""
    with writing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
