"""Activations that overflow: whether any do, and at which layer of a sequence first.

To learn the layer, the sequence is run again, so that decoding looks at one number a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from mlx_lqr.backends.hooks import UNSTEERED, LawHooks
from mlx_lqr.backends.protocol import CarryingLaw, Float32, Law
from mlx_lqr.errors import OverflowingError

Examined = tuple[list[list[float]], bool]
"""|z|^2 of z_0..z_T at L tokens, (T + 1, L), and whether the last one's logits are finite."""


def first_overflow(activations: Float32) -> int | None:
    """The first of n activations (n, ..., d) with a |z|^2 beyond float32, in which norms are computed."""
    with np.errstate(over="ignore", invalid="ignore"):
        energy = np.square(activations, dtype=np.float32).sum(axis=-1)
    spoiled = np.argwhere(~np.isfinite(energy))
    return int(spoiled[0, 0]) if len(spoiled) else None


def located(
    examine: Callable[[Sequence[int], LawHooks], Examined],
    tokens: Sequence[int],
    first: int,
    law: Law | None,
    *,
    layers: int,
    chunk: int,
    dtype: str,
) -> OverflowingError:
    """The error for a single sequence that overflows, with the first layer whose output does.

    Args:
        examine: runs the next tokens of the sequence.
        first: the first position that is steered.
        chunk: tokens to run at once; a law that goes from token to token takes them one by one.
        dtype: of the activations.
    """
    strength = getattr(law, "strength", ())  # not every law has one
    starts = [*range(0, first, chunk), *range(first, len(tokens), 1 if isinstance(law, CarryingLaw) else chunk)]
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        energies, logits_finite = examine(tokens[start:end], LawHooks(law) if start >= first else UNSTEERED)
        finite = [all(map(math.isfinite, row)) for row in energies]
        if not all(finite):
            return OverflowingError.at(finite.index(False) - 1, layers, dtype, strength)
        if not logits_finite:
            return OverflowingError.at(layers, layers, dtype, strength)
    return OverflowingError.at(None, layers, dtype, strength)
