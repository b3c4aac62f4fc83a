"""S-PID, the baseline of the A-LQR paper (arXiv 2604.19018): a PID controller of the feature, over layers and tokens.

u_k = kp e_k + ki E_k + kd (e_k - e_prev) with e_k = (s mu_k - v_k . z_k) v_k is added to the output of block k; v_k
and mu_k are the direction and the length of the mean difference at its input. E_k is the sum of e over the layers of
one token, set back to zero at every tenth; e_prev is the error of the layer before, and at the first layer that of
the token before, at its last layer. It is zero at the first token of an answer.

With a = kp + kd, I_k = ki E_k and D_k = kd e_k the law is u_k = a e_k + I_k - D_{k-1}, three rows along v_k. The
derivative goes from one token to the next, so that with kd every token has to be run by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_lqr.backends.protocol import Array
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.contrast import unit
from mlx_lqr.methods.baseline import Baseline, BaselineLaw, BaselineMethod
from mlx_lqr.methods.contrasted import contrasted
from mlx_lqr.methods.method import Compared, Option, Paper, Problem, StrengthScale

RESET_EVERY = 10
"""Layers after which the integral starts again from zero."""


class SPID(BaselineMethod):
    name = "spid"
    title = "S-PID"
    papers = (Paper("Skifstad et al.", 2026, "2604.19018", "a baseline of A-LQR"),)
    formula = "`y + kp e_k + ki E_k + kd (e_k - e_prev)`, `e_k = (s mu_k - v_k . z_k) v_k`"
    options = (
        Option("kp", float, 0.5, "Proportional gain.", tries=(0.5, 0.2, 1.0), kept=True),
        Option("ki", float, 0.05, "Integral gain.", tries=(0.05, 0.0), kept=True),
        Option("kd", float, 0.01, "Derivative gain.", tries=(0.01, 0.0), kept=True),
    )
    layers_to_try = ("auto", "last third", "all")
    strengths = StrengthScale("s asks for s times the length of `e` along it, as with `alqr`", span=(0.0, 8.0))
    tensors: Mapping[str, str] = {"direction": "Td", "setpoint": "T", "kept": "T"}

    def fit(self, problem: Problem, options: Mapping[str, Any]) -> Baseline:
        blank = self.blank(problem, options)
        sets = contrasted(problem, self.layers, at_input=True)
        tensors = {
            "direction": sets.active * unit(sets.inputs),
            "setpoint": np.linalg.norm(sets.inputs, axis=1) * sets.active[:, 0],
            "kept": (np.arange(len(sets.inputs)) % RESET_EVERY > 0).astype(np.float32),
        }
        return replace(blank, tensors=tensors, active_layers=sets.layers)

    def law(self, steering: Baseline, strength: float | Sequence[float]) -> PID:
        return (CarryingPID if steering.numbers["kd"] != 0 else PID)(steering, strength)

    def check(self, steering: Baseline) -> None:
        if steering.numbers["kd"] != 0 and steering.positions == "all":
            raise InputError(
                "the derivative of S-PID goes from one token to the next, while a prompt's tokens are run together: "
                "use positions 'last', or kd = 0"
            )

    def compared(self, num_layers: int) -> Compared:
        third = list(range(2 * num_layers // 3, num_layers))
        settings: dict[str, dict[str, Any]] = {
            "layers auto, kp 0.5, ki 0.05": {"layers": "auto"},
            "last third, kp 0.5, ki 0.05": {"layers": third},
        }
        return {self.name: settings}


class _Sums(threading.local):
    """I_k on the way through the layers of one pass; each thread has passes of its own."""

    integral: Array = None


class PID(BaselineLaw):
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


class CarryingPID(PID):
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
