"""JSON from files that may be damaged or made to do harm: parsed within bounds, and typed where it is used.

Python's own reader takes numbers that are infinite or have any number of digits, fails with a RecursionError where
values are nested deeply, and lets half a surrogate pair through, which nothing can print or write afterwards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from mlx_lqr.errors import InputError, first_line

DEPTH = 200
"""Values within values, at most; a config.json has 5."""
DIGITS = 19
"""Of a whole number; 64 bits have no more."""
NBYTES = 1 << 28
"""Of a file."""
LARGEST = (1 << 31) - 1
"""Count or size."""
LAYERS, WIDTH = 10_000, 1 << 20
"""Of a model, at most; far beyond any that there is."""


def parse_json(text: str, *, half_pairs: bool = False) -> Any:
    """The value that a text holds.

    Args:
        half_pairs: take half surrogate pairs too, which this library writes as escapes where a text has them.

    Raises:
        ValueError: no JSON; or values that are nested too deeply, numbers that are not finite or too long, or half
            surrogate pairs.
    """
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite, parse_int=_short)
        if not half_pairs and ("\\u" in text or not text.isascii()):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"it nests more than {DEPTH} values") from None
    except UnicodeEncodeError:
        raise ValueError("it has half a surrogate pair, which is no character") from None
    _check_depth(value)
    return value


def read_json(path: str | PathLike[str], advice: str = "download it again") -> Any:
    """The value in a file.

    Raises:
        InputError: the file cannot be read, or `parse_json` refuses it; the line ends with the advice.
    """
    file = Path(path)
    try:
        if file.stat().st_size > NBYTES:
            raise ValueError(f"it is larger than {NBYTES >> 20} MiB")
        return parse_json(file.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({first_line(error)}): {advice}") from error


def read_json_object(path: str | PathLike[str], advice: str = "download it again") -> dict[str, Any]:
    """The object in a file; raises as `read_json` does, and for any other value."""
    value = read_json(path, advice)
    if not isinstance(value, dict):
        raise InputError(f"{path} is no JSON object: {advice}")
    return value


class Entries:
    """Metadata of a file, strings by name, some of which hold JSON. Every method raises `ValueError` for what is not
    there or not as it should be."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._metadata = metadata

    def __contains__(self, name: str) -> bool:
        return name in self._metadata

    def text(self, name: str) -> str:
        if name not in self._metadata:
            raise ValueError(f"it does not say its {name}")
        return self._metadata[name]

    def one_of(self, name: str, known: Sequence[str]) -> str:
        text = self.text(name)
        if text not in known:
            raise ValueError(f"its {name} is {text!r}, none of {', '.join(known)}")
        return text

    def number(self, name: str) -> float:
        return self._number(name, self.text(name))

    def count(self, name: str, least: int = 0, most: int = LARGEST) -> int:
        """A whole number."""
        return self._count(name, self.text(name), least, most)

    def layers(self, name: str, below: int) -> tuple[int, ...]:
        """Numbers of layers, each once and in order."""
        values = tuple(self._count(name, value, 0, below - 1) for value in self._list(name))
        if list(values) != sorted({*values}):
            self._wrong(name, list(values))
        return values

    def numbers(self, name: str) -> tuple[float, ...]:
        return tuple(self._number(name, value) for value in self._list(name))

    def named_numbers(self, name: str) -> dict[str, float]:
        value = parse_json(self.text(name))
        if not isinstance(value, dict):
            self._wrong(name, value)
        return {key: self._number(name, number) for key, number in value.items()}

    def texts(self, name: str) -> tuple[str, ...]:
        """At least one, none empty, none twice."""
        values = self._list(name)
        if not values or not all(isinstance(value, str) and value for value in values) or len({*values}) < len(values):
            self._wrong(name, values)
        return tuple(values)

    def choices(self, name: str, known: Sequence[str], count: int) -> tuple[str, ...]:
        """As many of these texts."""
        values = self._list(name)
        if len(values) != count or not all(value in known for value in values):
            self._wrong(name, values)
        return tuple(values)

    def pairs(self, name: str, count: int) -> tuple[tuple[int, int], ...]:
        """As many pairs of counts."""
        values = self._list(name)
        if len(values) != count or not all(isinstance(value, list) and len(value) == 2 for value in values):
            self._wrong(name, values)
        return tuple((self._count(name, a), self._count(name, b)) for a, b in values)

    def named_pairs(self, name: str, count: int) -> tuple[dict[str, tuple[float, float]] | None, ...]:
        """As many objects of pairs of numbers, any of them null."""
        values = self._list(name)
        if len(values) != count:
            self._wrong(name, values)
        return tuple(None if value is None else self._pairs_of(name, value) for value in values)

    def _pairs_of(self, name: str, value: Any) -> dict[str, tuple[float, float]]:
        if not isinstance(value, dict):
            self._wrong(name, value)
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in value.values()):
            self._wrong(name, value)
        return {key: (self._number(name, a), self._number(name, b)) for key, (a, b) in value.items()}

    def _list(self, name: str) -> list[Any]:
        value = parse_json(self.text(name))
        if not isinstance(value, list):
            self._wrong(name, value)
        return value

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            self._wrong(name, value)
        number = float(value)
        if not math.isfinite(number):
            self._wrong(name, value)
        return number

    def _count(self, name: str, value: Any, least: int = 0, most: int = LARGEST) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, str)) or len(str(value)) > DIGITS:
            self._wrong(name, value)
        if not least <= int(value) <= most:
            self._wrong(name, value)
        return int(value)

    def _wrong(self, name: str, value: Any) -> NoReturn:
        raise ValueError(f"its {name} cannot be {str(value)[:40]!r}")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no finite number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def _short(text: str) -> int:
    if len(text.lstrip("-")) > DIGITS:
        raise ValueError(f"the number {text[:20]}... is too long")
    return int(text)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        level = [
            part
            for one in level
            if isinstance(one, (list, dict))
            for part in (one.values() if isinstance(one, dict) else one)
            if isinstance(part, (list, dict))
        ]
        if not level:
            return
    raise ValueError(f"it nests more than {DEPTH} values")
