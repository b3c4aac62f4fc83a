"""What a person writes on a command line -> what the library takes, for every front end and parser of options."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_lqr.errors import InputError
from mlx_lqr.files.text import is_unicode
from mlx_lqr.lqr.strength import Strengths, default_strength
from mlx_lqr.methods.baseline import Steering, combine, load_steering


def parse_controller(text: str, model: str = "MODEL") -> tuple[Steering, Strengths]:
    """FILE[:STRENGTH] and the strength of each concept, which is by default what the file recommends, or 1."""
    file, number = split_file(text)
    strength = parse_strength(number) if number is not None else None
    steering = load_steering(file, model)
    return steering, default_strength(steering) if strength is None else (strength,) * len(steering.concepts)


def split_file(text: str) -> tuple[str, str | None]:
    """FILE[:WHAT] -> the file, and what stands after the colon; a file whose own name has a colon is found as well."""
    if Path(text).is_file() or ":" not in text:
        return text, None
    file, _, what = text.rpartition(":")
    return file, what


def parse_strength(number: str) -> float:
    try:
        strength = float(number)
    except ValueError:
        raise InputError(f"strength must be a number, not {number!r} (write -c FILE:STRENGTH)") from None
    if not math.isfinite(strength):
        raise InputError(f"strength must be a finite number, not {number!r} (write -c FILE:STRENGTH)")
    return strength


def parse_controllers(texts: Sequence[str], model: str = "MODEL") -> tuple[Steering | None, list[float]]:
    """All the -c options as one steering and a strength for each of its concepts."""
    loaded = [parse_controller(text, model) for text in texts]
    if not loaded:
        return None, []
    strengths = [strength for _, own in loaded for strength in own]
    return combine([controller for controller, _ in loaded]), strengths


def given_or_piped(prompt: str | None) -> str:
    """The prompt of the command line, or where there is none the text that comes through a pipe.

    One newline at the end of what is piped is not part of it: `echo` and editors put it there.

    Raises:
        InputError: neither is there, it is blank, or it is not UTF-8 text.
    """
    if prompt is None:
        prompt = _piped()
    elif not is_unicode(prompt):  # bytes of the command line that Python could not decode
        raise InputError("the prompt is not UTF-8 text")
    if not prompt.strip():
        raise InputError("the prompt is empty, or nothing but spaces: give the text to continue, -p TEXT")
    return prompt


def _piped() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("give the text to continue: -p TEXT, or through a pipe")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")  # whatever encoding the terminal has
    except UnicodeDecodeError:
        raise InputError("what comes through the pipe is not UTF-8 text") from None
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
