"""A session: a transcript that also says how the conversation is to go on, by options and files of controllers.

To a transcript's entries it adds `options`, how answers are decoded, and `steering`: for each concept the controller's
file, the strength, and whether it is on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, cast

from mlx_lqr.errors import InputError
from mlx_lqr.methods.law import check_strength
from mlx_lqr.runtime.chat import Chat
from mlx_lqr.runtime.generate import Options
from mlx_lqr.runtime.transcript import read_entries

_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
_COUNTS = ("max_tokens", "top_k", "seed")
_MAY_BE_NULL = ("seed", "adaptive", "frequency_penalty")
OPTIONS = (*_NUMBERS, *_COUNTS, "stop", "overflow", "adaptive")
"""Those that a session keeps, by the names of `Options`"""


@dataclass(frozen=True)
class SteeredBy:
    """What steers towards one concept."""

    concept: str
    file: str
    strength: float
    on: bool


@dataclass(frozen=True)
class Session:
    """How a conversation is to go on."""

    options: Options
    steering: tuple[SteeredBy, ...]


def save_session(path: str | PathLike[str], chat: Chat, files: Mapping[str, str]) -> None:
    """Write a conversation, and how it is to go on. The file is its owner's alone to read.

    Args:
        files: concept -> the file of its controller; a concept without one is not kept.

    Raises:
        InputError: the file cannot be written.
    """
    options: Mapping[str, Any] = chat.options
    strengths = [(name, value, True) for name, value in chat.strengths.items()]
    strengths += [(name, value, False) for name, value in chat.resting.items()]
    steering = [asdict(SteeredBy(name, files[name], value, on)) for name, value, on in strengths if name in files]
    kept = {name: options[name] for name in OPTIONS if name in options}
    chat.save(path, session={"options": kept, "steering": steering})


def read_session(path: str | PathLike[str]) -> Session:
    """How the conversation in a file is to go on; `Chat.load` reads the conversation itself.

    Raises:
        InputError: the file is missing, damaged or no session.
    """
    entries = read_entries(path)
    try:
        options, steering = entries["options"], entries["steering"]
        if not isinstance(options, dict) or not isinstance(steering, list):
            raise ValueError("its options or steering are of the wrong type")
        return Session(_options(options), tuple(_steered_by(one) for one in steering))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{path} is no session, or damaged ({reason}): name one that /sessions lists") from None


def _options(options: Mapping[str, Any]) -> Options:
    for name, value in options.items():
        if value is None and name in _MAY_BE_NULL:
            continue
        if not _is_sound(name, value):
            raise ValueError(f"its {name} cannot be {str(value)[:40]!r}")
    return cast(Options, dict(options))


def _is_sound(name: str, value: Any) -> bool:
    if name in _NUMBERS:
        return type(value) in (int, float) and math.isfinite(value)
    if name in _COUNTS:
        return type(value) is int
    if name == "stop":
        return isinstance(value, Sequence) and all(isinstance(text, str) for text in value)
    if name == "overflow":
        return isinstance(value, str)
    return name == "adaptive" and type(value) is bool


def _steered_by(entry: Any) -> SteeredBy:
    if set(entry) != {"concept", "file", "strength", "on"}:
        raise ValueError("its steering has other entries than concept, file, strength and on")
    if not isinstance(entry["concept"], str) or not isinstance(entry["file"], str) or type(entry["on"]) is not bool:
        raise ValueError("a concept, file or on is of the wrong type")
    return SteeredBy(entry["concept"], entry["file"], check_strength(entry["strength"], 1)[0], entry["on"])
