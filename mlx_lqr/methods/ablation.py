"""Directional ablation (Arditi et al. 2024, arXiv 2406.11717): take away what lies along one direction, at every block.

y - s (v . y) v with one v for all blocks, the direction of the mean difference e_l at one place l of the model. With
s = 1 nothing of y lies along v any more. The paper tries every l on a task; here it is at three fifths of the depth
if nothing is said. To ablate a direction of its own at every block takes so much that no text is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_lqr.backends.protocol import Affine, Array
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.contrast import unit
from mlx_lqr.lqr.controller import Positions
from mlx_lqr.methods.baseline import Baseline, BaselineLaw, BaselineMethod
from mlx_lqr.methods.contrasted import contrasted
from mlx_lqr.methods.method import Compared, Option, Paper, Problem, StrengthScale


class Ablation(BaselineMethod):
    name = "ablation"
    title = "directional ablation"
    papers = (Paper("Arditi et al.", 2024, "2406.11717"),)
    formula = "`y - s (v . y) v`, with one `v` for every block"
    options = (
        Option(
            "source_layer",
            int,
            None,
            "The layer whose direction is ablated everywhere; by default at three fifths of the depth.",
            tries=lambda T: (3 * T // 5, T // 2, 2 * T // 5, 4 * T // 5),
        ),
    )
    positions: Positions = "all"
    layers_to_try = ()
    strengths = StrengthScale("1 takes away all of it", span=(0.0, 1.5))
    tensors: Mapping[str, str] = {"direction": "Td"}
    removes_only = True

    def fit(self, problem: Problem, options: Mapping[str, Any]) -> Baseline:
        T, source = problem.model.num_layers, options["source_layer"]
        source = 3 * T // 5 if source is None else source
        if not 0 <= source <= T:
            raise InputError(f"source_layer must be between 0 and {T}, not {source}")
        sets = contrasted(problem, self.layers)
        single = unit(np.vstack([sets.inputs, sets.outputs[-1:]])[source])
        if not single.any():
            raise InputError(f"layer {source} does not tell the prompts apart: choose another source layer")
        tensors = {"direction": sets.active * single}
        return replace(self.blank(problem, options), tensors=tensors, active_layers=sets.layers)

    def law(self, steering: Baseline, strength: float | Sequence[float]) -> Removal:
        return Removal(steering, strength)

    def compared(self, num_layers: int) -> Compared:
        T = num_layers
        half = list(range(T // 2, T))
        settings: dict[str, dict[str, Any]] = {
            "all layers, direction of three fifths": {"source_layer": 3 * T // 5},
            "last half, direction of two thirds": {"layers": half, "source_layer": 2 * T // 3},
        }
        return {self.name: settings}


class Removal(BaselineLaw):
    """y - s (v_k . y) v_k"""

    def _steered(self, layer: int, z: Array, output: Array) -> Array:
        (column,) = self._constant[layer]
        return self._add_product(output, output @ column, self._target[layer])

    def _affine(self, layer: int, aimed: np.ndarray) -> Affine:
        direction = self._tensors["direction"][layer][:, None]
        return Affine(np.zeros(1, np.float32), -aimed.T, read_output=direction)

    def _fixed(self, layer: int) -> tuple[np.ndarray, ...]:
        return (self._tensors["direction"][layer][:, None],)

    def _aimed(self, strength: np.ndarray) -> Any:
        return -strength * self._tensors["direction"][:, None, :]
