"""Text files that a user wrote: prompts, one a line or as JSON lines, and the rows of a task.

A file says itself what it is. Where it looks like something else than a list of prompts (a table, a JSON array, JSON
lines with one that is broken) it is refused, since its syntax would be steered with as if it were text.
"""

from __future__ import annotations

import json
import re
from os import PathLike
from pathlib import Path
from typing import Any

from mlx_lqr.errors import InputError

_JSON = re.compile(r'\s*(\{\s*"prompt"\s*:|\{\s*("[^"]*"\s*:|$)|\[\s*(["{]|$))')
"""How a line begins that can only be meant as JSON."""
_HEADER = re.compile(r'"?(prompts?|texts?|sentences?|questions?|instructions?|inputs?)"?', re.IGNORECASE)
_WORD = re.compile(r'"?[A-Za-z_]\w*"?')


def read_text(path: str | PathLike[str]) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark.

    Raises:
        InputError: the file cannot be read, or is no UTF-8 text.
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
    """The lines of a text, ended by newlines alone: U+2028 and its like are characters of a prompt like any other."""
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")


def read_lines(path: str | PathLike[str]) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, each with its number.

    Raises:
        InputError: see `read_text`.
    """
    return [(number, line) for number, line in enumerate(text_lines(read_text(path)), 1) if line.strip()]


def parse_object(line: str) -> dict[str, Any] | None:
    """The JSON object that a line is, or None."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_prompts(path: str | PathLike[str]) -> list[str]:
    """The prompts of a file: one a line, or JSON lines with a `prompt` key. Blank lines do not count.

    Raises:
        InputError: the file cannot be read, has no prompts, is of another kind, or has a line that is not like the
            others; file and line are named.
    """
    lines = read_lines(path)
    if not lines:
        raise InputError(f"{path} has no prompts: write one a line")
    objects = [parse_object(line) for _, line in lines]
    if any(found is not None for found in objects) or all(line.lstrip().startswith("{") for _, line in lines):
        return [_prompt(path, number, found) for (number, _), found in zip(lines, objects, strict=True)]
    for number, line in lines:
        if _JSON.match(line) and (number == lines[0][0] or '"prompt"' in line):
            raise InputError(
                f"{path}, line {number}, is JSON, but not JSON lines: write one prompt a line, as it is or as "
                '{"prompt": "..."}'
            )
    _refuse_table(path, [line for _, line in lines])
    return [line for _, line in lines]


def _prompt(path: str | PathLike[str], number: int, found: dict[str, Any] | None) -> str:
    if found is None or "prompt" not in found:
        raise InputError(f'{path}, line {number}: expected a JSON object with a "prompt" key')
    prompt = found["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f'{path}, line {number}: "prompt" must be text that is not empty')
    if not is_unicode(prompt):
        raise InputError(f'{path}, line {number}: "prompt" has half a surrogate pair, which is no character')
    return prompt


def is_unicode(text: str) -> bool:
    """Whether a text is made of characters alone, without half surrogate pairs, and so can be written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_table(path: str | PathLike[str], lines: list[str]) -> None:
    """Raise `InputError` for a table of separated values: by its name, or by a header of column names."""
    first = lines[0].strip()
    table = Path(path).suffix.lower() in (".csv", ".tsv") or bool(_HEADER.fullmatch(first) and len(lines) > 1)
    for separator in ",;\t":
        columns = first.split(separator)
        named = all(_WORD.fullmatch(column) for column in columns)
        table |= len(columns) > 1 and named and any(_HEADER.fullmatch(column) for column in columns)
    if table:
        raise InputError(
            f"{path} is a table (its first line: {first[:60]}): write one prompt a line, or JSON lines with a "
            '"prompt" key'
        )
