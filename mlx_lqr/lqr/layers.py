"""Which layers are controlled: those that are named, or those that separate the positive from the negative prompts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import numpy as np

from mlx_lqr.backends.protocol import Float32
from mlx_lqr.errors import InputError

if TYPE_CHECKING:
    from mlx_lqr.lqr.contrast import Contrast

Layers = Iterable[int] | Literal["auto", "all"] | None
"""Where to steer: these layers; "auto", the layers that separate the prompts (`choose_layers`); "all"; the default."""

SEPARATING = 0.8
"""layers="auto" takes every layer whose separation is at least this fraction of the best layer's. SmolLM2: 24 to 29 of
30 for "dog", 22 to 29 for "formal", 15 to 21 for "refusal"."""


def choose_layers(layers: Layers, contrast: Contrast) -> tuple[int, ...]:
    """The layers to control.

    Args:
        layers: "auto" takes the layers whose separation is at least `SEPARATING` times that of the best layer. None is
            "auto" too, except for two single prompts, which have no separation: then it is the last third of the
            layers, where steering costs least.

    Raises:
        InputError: no layers, layers that the model does not have, or sets too small for "auto".
    """
    T = len(contrast.direction)
    if layers is None and contrast.std is None:
        layers = range(2 * T // 3, T)
    if layers is None or (isinstance(layers, str) and layers == "auto"):
        return separating(contrast.separation[:-1])
    return check_layers(layers, T)


def separating(separation: Float32) -> tuple[int, ...]:
    """The indices whose separation is at least `SEPARATING` times the largest."""
    return tuple(int(k) for k in np.flatnonzero(separation >= SEPARATING * separation.max()))


def check_layers(layers: Iterable[int] | str | None, T: int) -> tuple[int, ...]:
    """`layers` as a sorted tuple of distinct indices below T. Negative ones count from the end; None and "all" are all.

    Raises:
        InputError: no layers, or one that the model does not have.
    """
    if isinstance(layers, str):
        if layers == "all":
            return tuple(range(T))
        raise InputError(f"layers must be numbers such as range(20, 30), not {layers!r}")
    chosen = sorted({k + T if k < 0 else k for k in (range(T) if layers is None else layers)})
    if not chosen:
        raise InputError("no layers to control: name at least one")
    if chosen[0] < 0 or chosen[-1] >= T:
        raise InputError(f"layers must be between 0 and {T - 1} for this model")
    return tuple(chosen)
