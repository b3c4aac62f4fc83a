"""The laws of the methods that A-LQR is compared with. y = phi_k(z_k) is block k's output, s the strength.

| method | what becomes of y |
|---|---|
| ActAdd, CAA, Mean-AcT, PID-AcT | y + s b_k |
| proportional | y + kp (s mu_k - v_k . y) v_k |
| directional ablation | y - s (v_k . y) v_k |
| Linear-AcT | y + s ((scale_k - 1) o y + shift_k) |
| ITI | y as it is; s b_k is added to the output of its attention's projection |
| ODESteer | y carried along the gradient of a log-density ratio, for a time of s distance_k (see gradient_flow.py) |
| angular steering | y rotated in a fixed plane until its part there stands at s degrees from the concept's direction |

The vectors of block k belong to the place they act upon, z_{k+1}; but ablation has one for all blocks, and S-PID's are
those of z_k (see spid.py). At s = 0 nothing is steered, whatever the formula says there (see adjustable.py): the
concept's own direction is at 360 degrees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_lqr.backends.protocol import Array, Site
from mlx_lqr.errors import InputError
from mlx_lqr.methods.baseline import METHODS, Baseline
from mlx_lqr.methods.laws.adjustable import AdjustableLaw


class BaselineLaw(AdjustableLaw):
    """What the laws below have in common: the vectors they are made of.

    Args:
        steering: what was fitted.
        strength: see the table above; for methods of a single concept one number.
    """

    def __init__(self, steering: Baseline, strength: float | Sequence[float] = 1.0) -> None:
        for name in METHODS[steering.method].tensors:
            if not np.all(np.isfinite(steering.tensors[name])):
                raise InputError(f"the {name} has values that are not finite: fit it again")
        self._steering = steering
        self._tensors, self._numbers = steering.tensors, steering.numbers
        super().__init__(steering.active_layers, len(steering.concepts), strength)


class Addition(BaselineLaw):
    """y + sum_i s_i b_ki, with a shift b_k (d,) of each concept: constant, whatever y is."""

    def _steered(self, layer: int, z: Array, output: Array) -> Array:
        return output + self._target[layer]

    def _fixed(self, layer: int) -> tuple[np.ndarray, ...]:
        return ()

    def _aimed(self, strength: np.ndarray) -> Any:
        return self._tensors["shift"] @ strength


class AttentionAddition(Addition):
    """sum_i s_i b_ki added to what the attention's projection puts out, b_k = O_k [sigma_h theta_h] over its heads h.

    The projection O_k is linear, so that this moves every head's output x_h to x_h + s sigma_h theta_h.
    """

    site: Site = "attention"

    def _aimed(self, strength: np.ndarray) -> Any:
        return self._tensors["attention_shift"] @ strength


class Proportional(BaselineLaw):
    """y + kp (s mu_k - v_k . y) v_k: with kp = 1 the feature v_k . y is at its setpoint s mu_k afterwards."""

    def _steered(self, layer: int, z: Array, output: Array) -> Array:
        minus_direction, row = self._constant[layer]
        error = self._add_product(self._target[layer], output, minus_direction)
        return self._add_product(output, error, row)

    def _fixed(self, layer: int) -> tuple[np.ndarray, ...]:
        direction = self._tensors["direction"][layer]
        return -direction[:, None], np.float32(self._numbers["kp"]) * direction[None]

    def _aimed(self, strength: np.ndarray) -> Any:
        return self._tensors["setpoint"][:, None] * strength


class Ablation(BaselineLaw):
    """y - s (v_k . y) v_k: with s = 1 nothing of y lies along v_k any more."""

    def _steered(self, layer: int, z: Array, output: Array) -> Array:
        (column,) = self._constant[layer]
        return self._add_product(output, output @ column, self._target[layer])

    def _fixed(self, layer: int) -> tuple[np.ndarray, ...]:
        return (self._tensors["direction"][layer][:, None],)

    def _aimed(self, strength: np.ndarray) -> Any:
        return -strength * self._tensors["direction"][:, None, :]


class Transport(BaselineLaw):
    """y + s ((scale_k - 1) o y + shift_k): each neuron on its own, from where it is (s = 0) to where it is to be."""

    def _steered(self, layer: int, z: Array, output: Array) -> Array:
        stretch, shift = self._constant[layer]
        return output + (output * stretch + shift) * self._target[layer]

    def _fixed(self, layer: int) -> tuple[np.ndarray, ...]:
        return self._tensors["scale"][layer] - np.float32(1), self._tensors["shift"][layer]

    def _aimed(self, strength: np.ndarray) -> Any:
        return dict.fromkeys(self.layers, strength)


class Rotation(BaselineLaw):
    """y + (|p| [cos s, sin s] - p) B' with p = y B, for an orthonormal basis B (d, 2): |y| stays what it is."""

    beyond_use = 360.0

    def _use(self, strength: float) -> str:
        return f"it is an angle in degrees, the same as {strength % 360:g}"

    def _steered(self, layer: int, z: Array, output: Array) -> Array:
        basis, basis_transposed = self._constant[layer]
        return self._add_product(output, self._turn(layer, output @ basis), basis_transposed)

    def _turn(self, layer: int, inside: Array) -> Array:
        """What is to be added to p (..., 2) within the plane."""
        small = inside * 0.015625  # whose squares float16 holds
        length = (small[..., :1] ** 2 + small[..., 1:] ** 2) ** 0.5 * 64
        return length * self._target[layer] - inside

    def _fixed(self, layer: int) -> tuple[np.ndarray, ...]:
        plane = self._tensors["plane"]
        return plane, np.ascontiguousarray(plane.T)

    def _aimed(self, strength: np.ndarray) -> Any:
        angle = np.deg2rad(strength)
        return dict.fromkeys(self.layers, np.concatenate([np.cos(angle), np.sin(angle)]))


class AdaptiveRotation(Rotation):
    """The same where y points along the concept's direction, and y as it is elsewhere."""

    def _turn(self, layer: int, inside: Array) -> Array:
        return super()._turn(layer, inside) * (inside[..., :1] > 0)
