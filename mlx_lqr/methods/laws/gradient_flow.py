"""ODESteer (Zhao et al. 2026, arXiv 2602.17560): a block's output is carried up the log-density ratio of the prompts.

dy/dt = grad h(y) / |grad h(y)|, y(0) = phi_k(z_k), for a time of s distance_k, by `STEPS` steps of Euler's method. The
barrier function h is a quadratic function of y / |y| (see density_ratio.py), whose gradient is two products with the
activations u_i of the prompts it was fitted on: with u = y / |y| and g = 2 sum_i w_i (u . u_i + OFFSET) u_i it is
(g - (g . u) u) / |y|.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_lqr.backends.protocol import Array
from mlx_lqr.methods.laws.baselines import BaselineLaw

OFFSET = 0.1
"""In the kernel (u . u_i + OFFSET)^2: how much linear features count beside products of two (the authors' default)."""
STEPS = 10
_SMALL = 1e-6
"""Added to the gradient's length, which is about 1, so that where there is none nothing moves."""


class GradientFlow(BaselineLaw):
    """y(s distance_k) of the equation above. A negative strength goes down."""

    def _steered(self, layer: int, z: Array, output: Array) -> Array:
        columns, rows = self._constant[layer]
        for _ in range(STEPS):
            small = output * 0.015625  # whose squares float16 holds
            unit = small / (small * small).sum(-1, keepdims=True) ** 0.5
            gradient = (unit @ columns + OFFSET) @ rows
            gradient = gradient - (gradient * unit).sum(-1, keepdims=True) * unit
            length = (gradient * gradient).sum(-1, keepdims=True) ** 0.5
            output = output + gradient / (length + _SMALL) * self._target[layer]
        return output

    def _fixed(self, layer: int) -> tuple[np.ndarray, ...]:
        anchors, weights = self._tensors["anchors"], self._tensors["weights"]
        return np.ascontiguousarray(anchors.T), weights[:, None] * anchors

    def _aimed(self, strength: np.ndarray) -> Any:
        return self._tensors["distance"][:, None] * strength / np.float32(STEPS)
