"""Linear-AcT, activation transport neuron by neuron (Rodriguez et al. 2024, arXiv 2410.23054).

y + s ((scale_k - 1) o y + shift_k): each neuron goes from where it is (s = 0) to where it is to be (s = 1). Scale and
shift are the least squares of the sorted activations of the neuron under the negative prompts, steered before block
k, and under the positive ones. The paper uses the map in the range of the negative activations, here it is used
everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_lqr.backends.protocol import Array, Float32
from mlx_lqr.methods.baseline import Baseline, BaselineLaw
from mlx_lqr.methods.method import Paper, StrengthScale
from mlx_lqr.methods.sequential import SequentialMethod, Transport


class LinearAcT(SequentialMethod):
    name = "linear-act"
    title = "Linear-AcT"
    papers = (Paper("Rodriguez et al.", 2024, "2410.23054"),)
    formula = "`y + s ((scale - 1) y + shift)`, neuron by neuron, from sorted activations"
    strengths = StrengthScale("1 does all that was fitted", span=(0.0, 2.0))
    tensors: Mapping[str, str] = {"scale": "Td", "shift": "Td"}
    identity: Mapping[str, float] = {"scale": 1.0, "shift": 0.0}

    def transport(self, options: Mapping[str, Any]) -> Transport:
        return lambda source, target: dict(zip(("scale", "shift"), linear_map(source, target), strict=True))

    def law(self, steering: Baseline, strength: float | Sequence[float]) -> LinearTransport:
        return LinearTransport(steering, strength)


class LinearTransport(BaselineLaw):
    """y + s ((scale_k - 1) o y + shift_k)"""

    def _steered(self, layer: int, z: Array, output: Array) -> Array:
        stretch, shift = self._constant[layer]
        return output + (output * stretch + shift) * self._target[layer]

    def _fixed(self, layer: int) -> tuple[np.ndarray, ...]:
        return self._tensors["scale"][layer] - np.float32(1), self._tensors["shift"][layer]

    def _aimed(self, strength: np.ndarray) -> Any:
        return dict.fromkeys(self.layers, strength)


def linear_map(source: Float32, target: Float32) -> tuple[Float32, Float32]:
    """For each of d neurons the increasing map a -> scale a + shift that takes the activations of `source` (n, d) to
    those of `target` (m, d), both sorted, with the least squared error: scale and shift, (d,) each.

    Sets of different sizes are compared at as many quantiles as the larger has activations. The mean goes onto the
    mean; a neuron that is constant is only shifted.
    """
    count = max(len(source), len(target))
    at = (np.arange(count) + 0.5) / count
    a, b = (np.quantile(rows.astype(np.float64), at, axis=0, method="hazen") for rows in (source, target))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    spread = (a * a).sum(axis=0)
    scale = np.divide((a * b).sum(axis=0), spread, out=np.ones_like(spread), where=spread > 1e-12)
    shift = target.mean(axis=0, dtype=np.float64) - scale * source.mean(axis=0, dtype=np.float64)
    return scale.astype(np.float32), shift.astype(np.float32)
