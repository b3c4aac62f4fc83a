"""The bundled contrast sets: for each concept a file of positive and a file of negative prompts."""

from __future__ import annotations

from importlib import resources

from mlx_lqr.errors import InputError
from mlx_lqr.files.text import text_lines

_POSITIVE, _NEGATIVE = ".positive.txt", ".negative.txt"


def bundled_concepts() -> list[str]:
    """The names of the bundled contrast sets."""
    root = resources.files("mlx_lqr.concepts")
    return sorted(entry.name.removesuffix(_POSITIVE) for entry in root.iterdir() if entry.name.endswith(_POSITIVE))


def bundled_prompts(concept: str) -> tuple[list[str], list[str]]:
    """The positive and negative prompts of a bundled contrast set.

    Raises:
        InputError: there is no bundled concept of this name.
    """
    if concept not in bundled_concepts():
        raise InputError(f"no bundled concept {concept!r}: choose one of {', '.join(bundled_concepts())}")
    root = resources.files("mlx_lqr.concepts")
    positive, negative = (
        text_lines(root.joinpath(concept + ending).read_text("utf-8")) for ending in (_POSITIVE, _NEGATIVE)
    )
    return positive, negative
