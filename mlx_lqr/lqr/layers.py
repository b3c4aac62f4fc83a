"""Which layers are controlled: those that are named, or those where a push for the concept works.

Two things tell where it does. Separation: whether the feature v_k . z_k tells prompts of the two sets apart that the
direction was not computed from (`Contrast.held_out`); in early layers it mostly tells apart only the prompts that it
was computed from. Authority, as in control theory: how far a push at a layer moves what it is to move in the end. A
push of e_{k+1} at the output of block k moves z_T, to first order, by A_{T-1} ... A_{k+1} e_{k+1}; its authority is
that along v_T, as a share of mu_T. It is 1 at the last layer; where it is near 0, the rest of the model forgets the
push, or makes something else of it. layers="auto" takes the layers where the product of both is at least `EFFECTIVE`
times the best layer's. docs/comparison.md has what this rule does against others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import numpy as np

from mlx_lqr.backends.protocol import Float32
from mlx_lqr.errors import InputError

if TYPE_CHECKING:
    from mlx_lqr.lqr.contrast import Contrast
    from mlx_lqr.lqr.linearize import Jacobians
    from mlx_lqr.lqr.riccati import Product

Layers = Iterable[int] | Literal["auto", "all"] | None
"""Where to steer: these layers; "auto", where a push for the concept works (`choose_layers`); "all"; the default."""

EFFECTIVE = 1 / 3
"""layers="auto" takes every layer that is at least this fraction as good as the best one. SmolLM2: 24 to 29 of
30 for "dog", 22 to 29 for "formal", 18 to 29 for "refusal"."""
SEPARATING = 0.8
"""The fraction where separation alone decides, which differs less from layer to layer."""
FEW = 8
"""Prompts of a set, below which their separation says nothing and authority alone decides."""


def choose_layers(
    layers: Layers, contrast: Contrast, jacobians: Jacobians | None = None, *, least: float | None = None
) -> tuple[int, ...]:
    """The layers to control.

    Args:
        layers: "auto" or None: where held-out separation times authority is at least `EFFECTIVE` times that of the best
            layer. With fewer than `FEW` prompts of a kind authority alone decides.
        jacobians: of the same model; without them separation alone decides, and `SEPARATING` is the fraction.
        least: another fraction.

    Raises:
        InputError: no layers, layers that the model does not have, or "auto" without Jacobians for sets that are too
            small to say anything.
    """
    if not is_auto(layers):
        return check_layers(layers, len(contrast.direction))
    reached = None if jacobians is None else authority(contrast, jacobians.pull_back, jacobians.side)
    return effective(contrast, reached, least)


def is_auto(layers: Layers) -> bool:
    """Whether the layers are to be found."""
    return layers is None or (isinstance(layers, str) and layers == "auto")


def effective(contrast: Contrast, authority: Float32 | None, least: float | None = None) -> tuple[int, ...]:
    """The layers of "auto", from the `authority` (T,) of each, or from separation alone.

    Args:
        least: the fraction of the best one; None takes `EFFECTIVE`, or `SEPARATING`.

    Raises:
        InputError: no authority, and fewer than two prompts in a set.
    """
    separation = contrast.held_out[:-1] if contrast.held_out is not None else None
    if authority is None:
        if separation is None:
            raise InputError('layers "auto" compares the prompts of a set with one another: give more than one of each')
        return best_of(separation, SEPARATING if least is None else least)
    least = EFFECTIVE if least is None else least
    if separation is None or min(contrast.prompt_counts) < FEW:
        return best_of(authority, least)
    both = np.maximum(separation, 0) * np.maximum(authority, 0)
    return best_of(both if both.any() else authority, least)


def best_of(values: Float32, least: float) -> tuple[int, ...]:
    """The indices whose value is at least this fraction of the largest."""
    return tuple(int(k) for k in np.flatnonzero(values >= least * values.max()))


def authority(contrast: Contrast, product: Product, side: int = 0) -> Float32:
    """v_T . (A_{T-1} ... A_{k+1} e_{k+1}) / mu_T for every layer k: (T,). Zero where the outputs have no direction.

    Args:
        product: (k, X) -> A_k' X for X (d + m, n).
        side: m, how many numbers blocks hand on beside the residual stream.
    """
    T, magnitude = len(contrast.direction), contrast.output_magnitude
    reached = np.zeros(T, np.float32)
    if not magnitude:
        return reached
    outputs = np.vstack([contrast.direction[1:], contrast.output_direction[None]]).astype(np.float64)
    row = np.concatenate([outputs[-1] / magnitude, np.zeros(side)])
    for k in reversed(range(T)):
        reached[k] = row[: outputs.shape[1]] @ outputs[k] / magnitude
        if k:
            row = product(k, row[:, None])[:, 0]
    return reached


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
