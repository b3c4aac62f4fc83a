"""Exceptions for mistakes that the user can correct."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LENGTH = 1000
"""Characters of a message, at most."""


class InputError(ValueError):
    """An argument or a file cannot be used; the message is one line that says what to do.

    The command line prints the message and exits with status 2; from Python it is an ordinary `ValueError`. Whatever a
    damaged file has put into a message, it stays a line that can be printed and read.
    """

    def __init__(self, message: str = "") -> None:
        if not message.isprintable():
            # half a surrogate pair, which no terminal takes, becomes its escape; a line's end a space
            message = " ".join(message.splitlines()).encode("utf-8", "backslashreplace").decode()
        if len(message) > LENGTH:  # its end says what to do
            message = f"{message[: LENGTH * 2 // 3]} ... {message[-LENGTH // 4 :]}"
        super().__init__(message)


def quoted(value: Any) -> str:
    """A value from a file as it stands in a message: what Python writes for it, at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; the error's name if it has no message."""
    return str(error).strip().partition("\n")[0][:200].rstrip(". ") or type(error).__name__


class OverflowingError(InputError):
    """Activations overflow: the strength is too high for this model and controller, or the dtype too narrow."""

    @classmethod
    def at(cls, layer: int | None, layers: int, dtype: str, strength: Sequence[float] = ()) -> OverflowingError:
        """The error that names the place and says what to do.

        Args:
            layer: the first layer whose output overflows; -1 for the embedding, `layers` for what comes after the last
                block, None if it is not known.
            layers: how many blocks the model has.
            dtype: the dtype of the activations.
            strength: the strength of each concept; empty or zero if nothing steers.
        """
        places = {None: "", -1: " in the embedding", layers: " after the last layer"}
        where = places.get(layer, f" at layer {layer}")
        if any(strength):
            also = ", or load the model with dtype float32" if dtype == "float16" else ""
            named = ", ".join(f"{number:g}" for number in strength)
            return cls(f"the activations overflow{where} at strength {named}: lower the strength{also}")
        if dtype == "float16":
            return cls(f"the activations overflow float16{where}: load the model with dtype bfloat16 or float32")
        return cls(f"the activations overflow{where}: the model is damaged, download or convert it again")
