"""Files of prompts: one prompt a line, or JSON lines.

A file that looks like anything else (a table, a JSON array, JSON lines with a broken one) is refused, since its syntax
would be taken for the text of prompts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import writing
from mlx_lqr.files.text import is_unicode, parse_object, read_lines, text_lines
from mlx_lqr.launched import rank

_JSON = re.compile(r'\s*(\{\s*"prompt"\s*:|\{\s*("[^"]*"\s*:|$)|\[\s*(["{]|$))')
"""The beginning of a line that can only be meant as JSON."""
_HEADER = re.compile(r'"?(prompts?|texts?|sentences?|questions?|instructions?|inputs?)"?', re.IGNORECASE)
_WORD = re.compile(r'"?[A-Za-z_]\w*"?')


def read_prompts(path: str | PathLike[str]) -> list[str]:
    """The prompts of a file: one a line, or JSON lines with a `prompt` key. Blank lines are skipped.

    Raises:
        InputError: the file cannot be read, has no prompts, is of another kind, or has a line unlike the others. The
            message names file and line.
    """
    lines = read_lines(path)
    if not lines:
        raise InputError(f"{path} has no prompts: write one a line")
    objects = [parse_object(line) for _, line in lines]
    if any(entry is not None for entry in objects) or all(line.lstrip().startswith("{") for _, line in lines):
        return [_prompt(path, number, entry) for (number, _), entry in zip(lines, objects, strict=True)]
    for number, line in lines:
        if _JSON.match(line) and (number == lines[0][0] or '"prompt"' in line):
            raise InputError(
                f"{path}, line {number}, is JSON, but not JSON lines: write one prompt a line, as it is or as "
                '{"prompt": "..."}'
            )
    _refuse_table(path, [line for _, line in lines])
    return [line for _, line in lines]


def write_prompts(path: str | PathLike[str], prompts: Sequence[str], *, force: bool = False) -> None:
    """Write prompts for `read_prompts`: one a line, or JSON lines where a prompt has line breaks or looks like JSON.

    Raises:
        InputError: there is a file of this name already (unless `force`), or it cannot be written.
    """
    check_new(path, force=force)
    if rank() > 0:  # the first of several processes writes
        return
    plain = not any(_JSON.match(prompt) or len(text_lines(prompt)) > 1 for prompt in prompts)
    lines = prompts if plain else [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    with writing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def check_new(path: str | PathLike[str], *, force: bool = False) -> None:
    """Raise `InputError` if there is a file already: prompts may have been edited, so they are not replaced unasked."""
    if not force and rank() == 0 and Path(path).exists():
        raise InputError(f"{path} exists already: fit with it (--positive, --negative), or replace it with --force")


def _prompt(path: str | PathLike[str], number: int, entry: dict[str, Any] | None) -> str:
    if entry is None or "prompt" not in entry:
        raise InputError(f'{path}, line {number}: expected a JSON object with a "prompt" key')
    prompt = entry["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f'{path}, line {number}: "prompt" must be text that is not empty')
    if not is_unicode(prompt):
        raise InputError(f'{path}, line {number}: "prompt" has half a surrogate pair, which is no character')
    return prompt


def _refuse_table(path: str | PathLike[str], lines: list[str]) -> None:
    """Raise `InputError` for a table of separated values, known by its file name or by a header of column names."""
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
