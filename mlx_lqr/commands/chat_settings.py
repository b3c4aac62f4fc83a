"""/set: what can be set while a chat goes on, each setting once, with how it is read and where it goes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlx_lqr.backends.protocol import Sampling
from mlx_lqr.commands.chat_state import Conversation
from mlx_lqr.errors import InputError
from mlx_lqr.runtime.arguments import DECODING_HELP
from mlx_lqr.runtime.decode import MAX_TOKENS
from mlx_lqr.runtime.generate import Options

NONE = "none"
LONGEST = 40
"""Characters of a value that a list of settings shows"""


@dataclass(frozen=True)
class Setting:
    """Something that /set sets."""

    help: str
    read: Callable[[str], Any]
    """The value that a person wrote; raises `ValueError`."""
    kind: str
    """What a value is, for a refusal"""
    get: Callable[[Conversation], Any]
    put: Callable[[Conversation, Any], None]


def set_value(conversation: Conversation, name: str, text: str) -> None:
    """Set a setting to what a person wrote.

    Raises:
        InputError: there is no such setting, or it cannot have that value; nothing has changed then.
    """
    setting = named(name)
    try:
        value = setting.read(text)
    except ValueError:
        raise InputError(f"{name} must be {setting.kind}, not {text!r}") from None
    setting.put(conversation, value)


def setting_row(conversation: Conversation, name: str) -> tuple[str, str]:
    """A setting with its value, and what it does."""
    setting = named(name)
    return f"{name:<{max(map(len, SETTINGS))}} {_shown(setting.get(conversation))}", setting.help


def named(name: str) -> Setting:
    """The setting of this name.

    Raises:
        InputError: there is none.
    """
    if name not in SETTINGS:
        raise InputError(f"there is no setting {name!r}: /set lists them")
    return SETTINGS[name]


def _shown(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else textwrap.shorten(str(value), LONGEST, placeholder="...")


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == NONE else read(text)


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError(text)
    return text == "on"


def _decoding(name: str, read: Callable[[str], Any], kind: str, default: Any) -> Setting:
    """An option of `mlx_lqr.Options`."""

    def put(conversation: Conversation, value: Any) -> None:
        option: Any = {name: value}
        conversation.chat.set_options(option)

    return Setting(DECODING_HELP[name], read, kind, lambda one: one.chat.options.get(name, default), put)


def _shows(name: str, help: str) -> Setting:
    """A switch of `Display`."""
    return Setting(
        help,
        _switch,
        "on or off",
        lambda one: getattr(one.display, name),
        lambda one, value: setattr(one.display, name, value),
    )


def _frequency(options: Options) -> float:
    """The frequency penalty that holds."""
    temperature = options.get("temperature", Sampling.temperature)
    return Sampling(temperature, frequency_penalty=options.get("frequency_penalty")).frequency


def _put_system(conversation: Conversation, text: str | None) -> None:
    conversation.chat.system_prompt = text


SETTINGS: Mapping[str, Setting] = {
    "temperature": _decoding("temperature", _number, "a number", Sampling.temperature),
    "top_p": _decoding("top_p", _number, "a number", Sampling.top_p),
    "top_k": _decoding("top_k", int, "a whole number", Sampling.top_k),
    "min_p": _decoding("min_p", _number, "a number", Sampling.min_p),
    "repetition_penalty": _decoding("repetition_penalty", _number, "a number", Sampling.repetition_penalty),
    "frequency_penalty": replace(
        _decoding("frequency_penalty", _number, "a number", None), get=lambda one: _frequency(one.chat.options)
    ),
    "presence_penalty": _decoding("presence_penalty", _number, "a number", Sampling.presence_penalty),
    "seed": _decoding("seed", _or_none(int), f"a whole number, or {NONE}", Sampling.seed),
    "max_tokens": _decoding("max_tokens", int, "a whole number", MAX_TOKENS),
    "system": Setting(
        f"The system prompt; {NONE} for none.", _or_none(str), "a text", lambda one: one.chat.system_prompt, _put_system
    ),
    "markdown": _shows("markdown", "Draw answers as Markdown, where the output is a terminal."),
    "stats": _shows("stats", "Say after each answer how many tokens it has, and how fast they came."),
}
"""What /set sets, in the order in which it lists them"""
