"""The strength that a file recommends, and what steers where nobody names one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

Strengths = tuple[float, ...]
"""One for each concept."""


class Recommending(Protocol):
    """What may come with a recommended strength."""

    @property
    def concepts(self) -> tuple[str, ...]: ...
    @property
    def strength(self) -> Strengths | None: ...


def default_strength(steering: Recommending) -> Strengths:
    """What steers where no strength is given: what is recommended for each concept, or 1."""
    return steering.strength if steering.strength is not None else (1.0,) * len(steering.concepts)


def combined_strength(steerings: Sequence[Recommending]) -> Strengths | None:
    """The recommendations of several side by side, 1 for those without one; None where none has one."""
    if all(one.strength is None for one in steerings):
        return None
    return tuple(strength for one in steerings for strength in default_strength(one))


def strength_metadata(strength: Strengths | None) -> dict[str, str]:
    """A file's entry for a recommended strength, if there is one."""
    return {} if strength is None else {"strength": json.dumps(strength)}


def read_strength(metadata: Mapping[str, str], concepts: int) -> Strengths | None:
    """A file's recommended strength, if it has one.

    Raises:
        ValueError: it is not one finite number for each concept.
    """
    if "strength" not in metadata:
        return None
    strength = tuple(float(number) for number in json.loads(metadata["strength"]))
    if len(strength) != concepts or not all(math.isfinite(number) for number in strength):
        raise ValueError(f"strength {metadata['strength']} for {concepts} concepts")
    return strength
