"""Text files that a user wrote: UTF-8 text, its lines, and the JSON object that a line holds."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from mlx_lqr.errors import InputError
from mlx_lqr.files.json_text import parse_json


def read_text(path: str | PathLike[str]) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark.

    Raises:
        InputError: the file cannot be read, or is not UTF-8 text.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is not UTF-8 text but UTF-16: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    if "\0" in text:
        raise InputError(f"{path} is not UTF-8 text (it has zero bytes): save it as UTF-8")
    return text


def text_lines(text: str) -> list[str]:
    """The lines of a text. Only newlines end them; U+2028 and the like are characters like any other."""
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")


def read_lines(path: str | PathLike[str]) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, each with its number, counted from 1.

    Raises:
        InputError: see `read_text`.
    """
    return [(number, line) for number, line in enumerate(text_lines(read_text(path)), 1) if line.strip()]


def parse_object(line: str) -> dict[str, Any] | None:
    """The JSON object on a line, or None."""
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no half surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
