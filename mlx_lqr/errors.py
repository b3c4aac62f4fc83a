"""Exceptions for mistakes that the user can correct."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """An argument or a file cannot be used; the message is one line that says what to do.

    The command line prints the message and exits with status 2; from Python it is an ordinary `ValueError`.
    """


def first_line(error: Exception) -> str:
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
