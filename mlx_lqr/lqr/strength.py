"""The strength that a file recommends, and the strength that is used where none is given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol

from mlx_lqr.files.json_text import Entries

Strengths = tuple[float, ...]
"""One for each concept."""


class Recommending(Protocol):
    """Steering that may recommend a strength."""

    @property
    def concepts(self) -> tuple[str, ...]: ...
    @property
    def strength(self) -> Strengths | None: ...


def default_strength(steering: Recommending) -> Strengths:
    """The strength used where none is given: for each concept the recommended one, or 1."""
    return steering.strength if steering.strength is not None else (1.0,) * len(steering.concepts)


def combined_strength(steerings: Sequence[Recommending]) -> Strengths | None:
    """The recommended strengths of several steerings, one after another, 1 for those without; None if none has one."""
    if all(one.strength is None for one in steerings):
        return None
    return tuple(strength for one in steerings for strength in default_strength(one))


def strength_metadata(strength: Strengths | None) -> dict[str, str]:
    """The metadata entry for a recommended strength; empty if there is none."""
    return {} if strength is None else {"strength": json.dumps(strength)}


def read_strength(entries: Entries, concepts: int) -> Strengths | None:
    """The strength recommended in a file's metadata, or None.

    Raises:
        ValueError: it is not one finite number for each concept.
    """
    if "strength" not in entries:
        return None
    strength = entries.numbers("strength")
    if len(strength) != concepts:
        raise ValueError(f"strength {entries.text('strength')} for {concepts} concepts")
    return strength
