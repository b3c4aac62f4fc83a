"""A conversation as a JSON file: the model, the strengths in force, and every message.

An answer also has the strengths it was steered with: `strengths` at its first token and, if they were set while it was
being written, `changes`, each with the first token that it applies to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from os import PathLike
from typing import Any

from mlx_lqr.backends.text.text_tokenizer import Message
from mlx_lqr.errors import InputError, first_line, quoted
from mlx_lqr.files.atomic import writing
from mlx_lqr.files.json_text import parse_json
from mlx_lqr.files.private import only_mine
from mlx_lqr.files.text import read_text
from mlx_lqr.methods.law import check_strength

FORMAT = "mlx-lqr transcript 2"
"""Version 1 had no format entry, and no strengths of each answer."""


@dataclass
class Given:
    """How one answer was steered."""

    reply: Message
    concepts: tuple[str, ...]
    strengths: list[tuple[float, ...]]
    """The strengths at each of its tokens; one entry more than there are tokens"""
    written: dict[str, Any] | None = None
    """The entries of the transcript that the answer was read from, if it was"""

    def entries(self) -> dict[str, Any]:
        """The strengths at the answer's first token, and each change after that with the token where it begins."""
        if self.written is not None:
            return self.written
        kept = self.strengths[: max(1, len(self.strengths) - 1)]
        runs = [(strengths, len(list(same))) for strengths, same in groupby(kept)]
        named: list[dict[str, Any]] = []
        token = 0
        for strengths, count in runs:
            named.append({"token": token, "strengths": dict(zip(self.concepts, strengths, strict=True))})
            token += count
        first: dict[str, Any] = {"strengths": named[0]["strengths"] if named else {}}
        return {**first, "changes": named[1:]} if len(named) > 1 else first

    @classmethod
    def read(cls, reply: Message, entries: dict[str, Any]) -> Given | None:
        """The inverse of `entries`, checked; None for an answer without strengths."""
        if "strengths" not in entries:
            return None
        written: dict[str, Any] = {"strengths": _checked(entries["strengths"])}
        token = 0
        for change in entries.get("changes", []):
            if type(change["token"]) is not int or change["token"] <= token:
                raise ValueError("the changes of an answer are not in the order of its tokens")
            token = change["token"]
            written.setdefault("changes", []).append({"token": token, "strengths": _checked(change["strengths"])})
        return cls(reply, (), [], written)


def transcript_entries(
    model: str, strengths: Mapping[str, float], messages: Sequence[Message], given: Sequence[Given]
) -> dict[str, Any]:
    """What a transcript holds.

    Args:
        model: its name.
        strengths: those in force.
        messages: the conversation.
        given: how its answers were steered, as far as that is known.
    """

    def entries(message: Message) -> dict[str, Any]:
        return next((one.entries() for one in reversed(given) if one.reply is message), {})

    return {
        "format": FORMAT,
        "model": model,
        "strengths": dict(strengths),
        "messages": [{**message, **entries(message)} for message in messages],
    }


def write_transcript(path: str | PathLike[str], entries: Mapping[str, Any], *, force: bool = False) -> None:
    """Write a conversation to a file, atomically. Its owner alone may read it, whoever could read the one it replaces.

    Args:
        entries: see `transcript_entries`.
        force: overwrite a file of any kind, not only a transcript.

    Raises:
        InputError: the file cannot be written, or is of another kind.
    """
    with writing(path, kind="transcript", force=force) as temporary:
        text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
        with open(temporary, "xb", opener=only_mine) as file:
            file.write(text.encode("utf-8", "backslashreplace"))


def read_transcript(path: str | PathLike[str]) -> tuple[str, dict[str, float], list[Message], list[Given]]:
    """The model, strengths and messages of a transcript, and how its answers were steered.

    Raises:
        InputError: the file is missing, damaged or no transcript.
    """
    transcript = read_entries(path)
    try:
        if transcript.get("format", FORMAT) != FORMAT:
            raise ValueError(f"its format is {quoted(transcript['format'])}, and this version reads {FORMAT!r}")
        name, strengths, messages = (transcript[key] for key in ("model", "strengths", "messages"))
        if not isinstance(name, str) or not isinstance(strengths, dict) or not isinstance(messages, list):
            raise ValueError("its model, strengths or messages are of the wrong type")
        checked = [_message(i, message, messages) for i, message in enumerate(messages)]
        given = [Given.read(reply, message) for reply, message in zip(checked, messages, strict=True)]
        return name, _checked(strengths), checked, [one for one in given if one is not None]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{path} is a damaged transcript ({reason}): name one that /save wrote") from None


def read_entries(path: str | PathLike[str]) -> Any:
    """The JSON value in a file, which has not been checked.

    Raises:
        InputError: the file cannot be read, or is not JSON.
    """
    try:
        return parse_json(read_text(path), half_pairs=True)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({first_line(error)}): name a transcript that /save wrote") from None


def _checked(strengths: dict[str, Any]) -> dict[str, float]:
    return {concept: check_strength(strength, 1)[0] for concept, strength in strengths.items()}


def _message(index: int, message: Any, messages: list[Any]) -> Message:
    """Checks a message: a system prompt may only come first; after it, user and assistant take turns."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise ValueError(f"message {index + 1} has no text")
    role = message.get("role")
    if role == "system" and index == 0:
        return {"role": "system", "content": message["content"]}
    first = int(messages[0]["role"] == "system")
    expected = ("user", "assistant")[(index - first) % 2]
    if role != expected:
        raise ValueError(f"message {index + 1} has the role {quoted(role)}, expected {expected!r}")
    if role == "user" and index == len(messages) - 1:
        raise ValueError("its last message has no answer")
    return {"role": role, "content": message["content"]}
