"""Angular steering (Vu and Nguyen 2025, arXiv 2510.26243): turn a block's output in a plane, at its own length.

y + (|p| [cos s, sin s] - p) B' with p = y B, for an orthonormal basis B (d, 2) of one plane for all blocks: the part
of y in the plane then stands at s degrees from the concept's direction, the first axis. The adaptive kind leaves
alone what points away from that direction. The paper turns the outputs of norms; to turn the residual stream itself
at every block left no text of SmolLM2, so that it is turned at the middle block if nothing is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_lqr.backends.protocol import Array, Float32
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.contrast import unit
from mlx_lqr.lqr.controller import Positions
from mlx_lqr.methods.baseline import Baseline, BaselineLaw, BaselineMethod
from mlx_lqr.methods.contrasted import contrasted
from mlx_lqr.methods.method import Compared, DefaultLayers, Paper, Problem, StrengthScale


class Angular(BaselineMethod):
    name = "angular"
    title = "angular steering"
    papers = (Paper("Vu and Nguyen", 2025, "2510.26243"),)
    formula = "`y` turned in a plane until it stands at `s` degrees from the concept"
    positions: Positions = "all"
    layers: DefaultLayers = "middle"
    layers_to_try = ("middle", "two thirds", "a third", "auto")
    strengths = StrengthScale(
        "s is the angle in degrees to the concept's direction, which itself is at 360",
        span=(110.0, 5.0),
        suggested=90.0,
        beyond=360.0,
        period=360.0,
    )
    tensors: Mapping[str, str] = {"plane": "d2"}

    def fit(self, problem: Problem, options: Mapping[str, Any]) -> Baseline:
        sets = contrasted(problem, self.layers)
        tensors = {"plane": plane(sets.outputs)}
        return replace(self.blank(problem, options), tensors=tensors, active_layers=sets.layers)

    def law(self, steering: Baseline, strength: float | Sequence[float]) -> Rotation:
        return Rotation(steering, strength)

    def compared(self, num_layers: int) -> Compared:
        middle = [num_layers // 2]
        settings: dict[str, dict[str, Any]] = {
            "middle layer": {"layers": middle},
            "middle layer, adaptive": {"layers": middle, "method": AdaptiveAngular.name},
        }
        return {self.name: settings}


class AdaptiveAngular(Angular):
    name = "adaptive-angular"
    title = "adaptive angular steering"
    formula = "the same where `y` points along the concept's direction, `y` elsewhere"

    def law(self, steering: Baseline, strength: float | Sequence[float]) -> AdaptiveRotation:
        return AdaptiveRotation(steering, strength)

    def compared(self, num_layers: int) -> Compared:
        """Nothing: it is one of the settings of `angular`."""
        return {}


class Rotation(BaselineLaw):
    """y + (|p| [cos s, sin s] - p) B' with p = y B"""

    def _steered(self, layer: int, z: Array, output: Array) -> Array:
        basis, basis_transposed = self._constant[layer]
        return self._add_product(output, self._turn(layer, output @ basis), basis_transposed)

    def _turn(self, layer: int, inside: Array) -> Array:
        """What is to be added to p (..., 2) within the plane."""
        small = inside * 0.015625  # whose squares float16 holds
        length = (small[..., :1] ** 2 + small[..., 1:] ** 2) ** 0.5 * 64
        return length * self._target[layer] - inside

    def _fixed(self, layer: int) -> tuple[np.ndarray, ...]:
        basis = self._tensors["plane"]
        return basis, np.ascontiguousarray(basis.T)

    def _aimed(self, strength: np.ndarray) -> Any:
        angle = np.deg2rad(strength)
        return dict.fromkeys(self.layers, np.concatenate([np.cos(angle), np.sin(angle)]))


class AdaptiveRotation(Rotation):
    """The same where y points along the concept's direction, and y as it is elsewhere."""

    def _turn(self, layer: int, inside: Array) -> Array:
        return super()._turn(layer, inside) * (inside[..., :1] > 0)


def plane(directions: Float32) -> Float32:
    """An orthonormal basis of the plane of rotation (d, 2) from the directions of all layers (T, d).

    Its first axis is the direction that is most like those of the other layers (by their mean cosine), its second the
    main axis (first principal component, about the mean) of all of them, without its part along the first. Directions
    are taken at length 1, or the last layers, where the residual stream is longest, would decide alone.

    Raises:
        InputError: the directions of all layers are one, so that there is no plane.
    """
    units = unit(directions).astype(np.float64)
    units = units[units.any(axis=1)]
    first = units[np.argmax((units @ units.T).mean(axis=1))]
    spread = np.linalg.svd(units - units.mean(axis=0), full_matrices=False)
    second = spread[2][0] - (spread[2][0] @ first) * first
    if spread[1][0] < 1e-6 or np.linalg.norm(second) < 1e-6:
        raise InputError("the directions of all layers are the same: there is no plane to rotate in")
    return np.stack([first, second / np.linalg.norm(second)], axis=1).astype(np.float32)
