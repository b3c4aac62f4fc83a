"""Proportional feedback: ActAdd with a setpoint, a first-order form of S-PID's law.

y + kp (s mu_k - v_k . y) v_k, where v_k and mu_k are the direction and the length of e_{k+1}, the mean difference at
the block's output. With kp = 1 the feature v_k . y is at its setpoint s mu_k afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_lqr.backends.protocol import Affine, Array
from mlx_lqr.lqr.contrast import unit
from mlx_lqr.methods.baseline import Baseline, BaselineLaw, BaselineMethod
from mlx_lqr.methods.contrasted import contrasted
from mlx_lqr.methods.method import Compared, Option, Problem, StrengthScale


class Proportional(BaselineMethod):
    name = "proportional"
    title = "proportional feedback (ActAdd with the setpoint)"
    formula = "`y + kp (s mu - v . y) v`"
    options = (Option("kp", float, 1.0, "Proportional gain.", tries=(0.3, 1.0, 0.15), kept=True),)
    layers_to_try = ("auto", "last third", "all")
    strengths = StrengthScale("s asks for s times the length of `e` along it, as with `alqr`", span=(0.0, 8.0))
    tensors: Mapping[str, str] = {"direction": "Td", "setpoint": "T"}

    def fit(self, problem: Problem, options: Mapping[str, Any]) -> Baseline:
        sets = contrasted(problem, self.layers)
        direction = sets.active * unit(sets.outputs)
        setpoint = np.linalg.norm(sets.outputs, axis=1) * sets.active[:, 0]
        tensors = {"direction": direction, "setpoint": setpoint}
        return replace(self.blank(problem, options), tensors=tensors, active_layers=sets.layers)

    def law(self, steering: Baseline, strength: float | Sequence[float]) -> ProportionalFeedback:
        return ProportionalFeedback(steering, strength)

    def compared(self, num_layers: int) -> Compared:
        third = list(range(2 * num_layers // 3, num_layers))
        settings: dict[str, dict[str, Any]] = {
            "layers auto, kp 0.4": {"layers": "auto", "kp": 0.4},
            "last third, kp 0.4": {"layers": third, "kp": 0.4},
        }
        return {self.name: settings}


class ProportionalFeedback(BaselineLaw):
    """y + kp (s mu_k - v_k . y) v_k"""

    def _steered(self, layer: int, z: Array, output: Array) -> Array:
        minus_direction, row = self._constant[layer]
        error = self._add_product(self._target[layer], output, minus_direction)
        return self._add_product(output, error, row)

    def _affine(self, layer: int, aimed: np.ndarray) -> Affine:
        direction = self._tensors["direction"][layer][:, None]
        return Affine(aimed, np.float32(self._numbers["kp"]) * direction, read_output=direction)

    def _fixed(self, layer: int) -> tuple[np.ndarray, ...]:
        direction = self._tensors["direction"][layer]
        return -direction[:, None], np.float32(self._numbers["kp"]) * direction[None]

    def _aimed(self, strength: np.ndarray) -> Any:
        return self._tensors["setpoint"][:, None] * strength
