"""An evaluation's file: JSON lines, a header and then one row for each measurement.

Rows are appended in whole chunks, each in one write that is forced to the disk. When the file is opened again, finished
chunks are kept; the rest of an interrupted chunk is cut off and measured again, so that no row is lost or there twice.
A file whose header has other settings is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import writing
from mlx_lqr.files.json_text import parse_json
from mlx_lqr.files.locks import locked
from mlx_lqr.launched import rank, refuse_several

FORMAT = "mlx-lqr evaluation 1"
CHUNK = 16
"""Rows that are measured and written together."""

Row = dict[str, Any]
Key = tuple[float, str]
"""(strength, part)"""


@contextmanager
def kept(header: Row, path: str | PathLike[str] | None) -> Iterator[Records]:
    """The rows in the file at `path`, which nobody else adds to inside this context; in memory alone without one.

    Raises:
        InputError: another mlx-lqr writes the file, or see `Records`.
    """
    with locked(path) if path is not None else nullcontext():
        yield Records(header, path)


class Records:
    """The rows so far, by strength and part, in the order of their `index`; in a file, or in memory alone."""

    def __init__(self, header: Row, path: str | PathLike[str] | None = None) -> None:
        """Open the file at `path` to continue it, or create it.

        Raises:
            InputError: the file is of another kind, damaged, or was made with other settings.
        """
        self.header: Row = json.loads(json.dumps({"format": FORMAT, **header}))
        self.rows: dict[Key, list[Row]] = {}
        self._path = Path(path) if path is not None and rank() == 0 else None
        if self._path is None:
            return
        if self._path.exists():
            refuse_several(f"{self._path} is there already, and evaluations are continued")
            self._read(self._path)
        else:
            self._begin(self._path)

    def of(self, strength: float, part: str) -> list[Row]:
        return self.rows.setdefault((strength, part), [])

    def append(self, strength: float, part: str, rows: Sequence[Row]) -> None:
        """Append rows of a strength and part, after those that are there.

        Raises:
            InputError: the file cannot be written.
        """
        known = self.of(strength, part)
        numbered = [
            {"strength": strength, "part": part, "index": index, **row} for index, row in enumerate(rows, len(known))
        ]
        if self._path is not None:
            try:
                with open(self._path, "ab") as file:
                    file.write(b"".join(_line(row) for row in numbered))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise InputError(f"cannot write {self._path}: {error.strerror or error}") from error
        known.extend(json.loads(json.dumps(numbered)))

    def _begin(self, path: Path) -> None:
        with writing(path) as temporary:
            temporary.write_bytes(_line(self.header))

    def _read(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        lines = content.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        if not lines:
            raise InputError(f"{path} is not an evaluation: name another file, or remove it")
        header = _parsed(path, 1, lines[0])
        if len(lines) == 1 and header.get("format") == FORMAT and header != self.header:
            self._begin(path)  # nothing has been measured yet
            return
        self._check_header(path, header)
        key: Key | None = None
        for number, line in enumerate(lines[1:], 2):
            row = _parsed(path, number, line)
            try:
                key = float(row["strength"]), str(row["part"])
                known = self.of(*key)
                if row["index"] != len(known):
                    raise KeyError
            except (KeyError, TypeError, ValueError):
                raise InputError(f"{path}, line {number}, does not belong there: remove the file") from None
            known.append(row)
        kept = len(lines)
        if key is not None and len(self.rows[key]) % CHUNK and len(self.rows[key]) != self._length(key[1]):
            cut = len(self.rows[key]) % CHUNK
            del self.rows[key][-cut:]
            kept -= cut
        size = sum(len(line) for line in lines[:kept])
        if size < len(content):
            try:
                os.truncate(path, size)
            except OSError as error:
                raise InputError(f"cannot write {path}: {error.strerror or error}") from error

    def _length(self, part: str) -> int | None:
        """How many rows a part has in all, by the header."""
        return dict(self.header.get("parts", {})).get(part, {}).get("rows")

    def _check_header(self, path: Path, header: Row) -> None:
        if header.get("format") != FORMAT:
            raise InputError(f"{path} is not an evaluation of this version: name another file, or remove it")
        if header != self.header:
            differing = sorted(_differences(header, self.header))
            raise InputError(
                f"{path} was made with other settings ({', '.join(differing)}): name another file, or remove it"
            )


def digest(content: Any) -> str:
    """A short digest of settings that are too long for a header: different ones get different digests."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """The dotted names of the settings that differ."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [name] if ours != theirs else []
    return [
        difference
        for key in ours.keys() | theirs.keys()
        for difference in _differences(ours.get(key), theirs.get(key), f"{name}.{key}".lstrip("."))
    ]


def _parsed(path: Path, number: int, line: bytes) -> Row:
    try:
        row = parse_json(line.decode(), half_pairs=True)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        what = "is not an evaluation" if number == 1 else f"is damaged at line {number}"
        raise InputError(f"{path} {what}: name another file, or remove it")
    return row


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
