"""S-PID: u_k = kp e_k + ki E_k + kd (e_k - e_prev) with e_k = (s mu_k - v_k . z_k) v_k (baseline of arXiv 2604.19018).

E_k is the sum of e over the layers of one token, set back to zero at some of them; e_prev is the error of the layer
before, and at the first layer that of the token before, at its last layer. It is zero at the first token of an answer.

Error and push are placed as in A-LQR: what is measured at the input of block k is added to its output. With a = kp +
kd, I_k = ki E_k and D_k = kd e_k the law is u_k = a e_k + I_k - D_{k-1}, three rows along v_k.
"""

from __future__ import annotations

import threading

import numpy as np

from mlx_lqr.backends.protocol import Array
from mlx_lqr.methods.laws.baselines import BaselineLaw


class _Sums(threading.local):
    """I_k on the way through the layers of one pass; each thread has passes of its own."""

    integral: Array = None


class SPID(BaselineLaw):
    """S-PID without a derivative (kd = 0): nothing goes from token to token."""

    def _steered(self, layer: int, z: Array, output: Array) -> Array:
        minus_direction, kept, proportional, integral, _ = self._constant[layer]
        error = self._add_product(self._target[layer], z, minus_direction)
        self._integrate(layer, error, integral, kept)
        return self._add_product(output, error, proportional) + self._sums.integral

    def _integrate(self, layer: int, error: Array, row: Array, kept: Array) -> None:
        """I_k = kept_k (I_{k-1} + ki e_k), from zero at the first layer."""
        started = layer != self.layers[0]
        total = self._add_product(self._sums.integral, error, row) if started else error @ row
        self._sums.integral = total * kept

    def _arrange(self) -> None:
        super()._arrange()
        self._sums = _Sums()

    def _fixed(self, layer: int) -> tuple[np.ndarray, ...]:
        row = self._tensors["direction"][layer][None]
        kp, ki, kd = (np.float32(self._numbers[name]) for name in ("kp", "ki", "kd"))
        return -row.T, self._tensors["kept"][layer][None], (kp + kd) * row, ki * row, kd * row

    def _aimed(self, strength: np.ndarray) -> np.ndarray:
        return self._tensors["setpoint"][:, None] * strength


class CarryingSPID(SPID):
    """S-PID whose derivative goes on from one token to the next (see `CarryingLaw`)."""

    def _arrange(self) -> None:
        super()._arrange()
        self.replayable = False
        self._derivative: Array = None  # D of the layer before, (B, L, d), and between passes of the last layer

    def __call__(self, layer: int, z: Array, output: Array) -> Array:
        if not self.acts:
            self._derivative = None  # the next token that is steered is like an answer's first
        return super().__call__(layer, z, output)

    def restart(self) -> None:
        self._derivative = None

    def keep(self, rows: Array) -> None:
        if self._derivative is not None:
            self._derivative = self._derivative[rows]

    def _steered(self, layer: int, z: Array, output: Array) -> Array:
        minus_direction, kept, proportional, integral, derivative = self._constant[layer]
        error = self._add_product(self._target[layer], z, minus_direction)
        self._integrate(layer, error, integral, kept)
        before, self._derivative = self._derivative, error @ derivative
        steered = self._add_product(output, error, proportional) + self._sums.integral
        return steered if before is None else steered - before
