"""ODESteer (Zhao et al. 2026, arXiv 2602.17560): a block's output is carried up the log-density ratio of the prompts.

dy/dt = grad h(y) / |grad h(y)|, y(0) = phi_k(z_k), for a time of s distance_k, by `STEPS` steps of Euler's method.

The barrier function h says how much likelier an activation is among the positive prompts than among the negative
ones. It is that of a logistic regression on all products of two of the entries of u = y / |y|, on these entries and
on 1, as the kernel (u . u' + OFFSET)^2 weighs them. The authors sketch these features at random (Count Sketch); here
the same regression is solved exactly in the prompts' span, where h(y) = sum_i w_i (u . u_i + OFFSET)^2 + constant.
Its gradient is two products with the prompts' u_i: with g = 2 sum_i w_i (u . u_i + OFFSET) u_i it is (g - (g . u) u)
/ |y|.

We had public summaries and code, not the paper: the unit of time, ten steps and the positions are our choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_lqr.backends.protocol import Array, Float32
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.contrast import unit
from mlx_lqr.methods.baseline import Baseline, BaselineLaw, BaselineMethod
from mlx_lqr.methods.contrasted import contrasted
from mlx_lqr.methods.method import Compared, DefaultLayers, Paper, Problem, StrengthScale
from mlx_lqr.methods.probes import Float64, logistic_regression

OFFSET = 0.1
"""In the kernel (u . u_i + OFFSET)^2: how much linear features count beside products of two (the authors' default)."""
STEPS = 10
_SMALL = 1e-6
"""Added to the gradient's length, which is about 1, so that where there is none nothing moves."""


class ODESteer(BaselineMethod):
    name = "odesteer"
    title = "ODESteer"
    papers = (Paper("Zhao et al.", 2026, "2602.17560"),)
    formula = "the end of a path from `y` up the log-density ratio of positive and negative activations"
    layers: DefaultLayers = "middle"
    layers_to_try = ("middle", "two thirds", "a third", "auto")
    strengths = StrengthScale("s goes a way s times as long as `e`", span=(0.0, 10.0), suggested=2.0)
    tensors: Mapping[str, str] = {"anchors": "nd", "weights": "n", "distance": "T"}

    def fit(self, problem: Problem, options: Mapping[str, Any]) -> Baseline:
        sets = contrasted(problem, self.layers)
        if len(sets.layers) != 1:
            raise InputError("odesteer acts at one layer: choose one, such as --layers 14")
        (layer,) = sets.layers
        outputs = sets.positive[:, layer + 1], sets.negative[:, layer + 1]
        return gradient_flow(self.blank(problem, options), layer, *outputs)

    def law(self, steering: Baseline, strength: float | Sequence[float]) -> GradientFlow:
        return GradientFlow(steering, strength)

    def compared(self, num_layers: int) -> Compared:
        T = num_layers
        return {self.name: {"middle layer": {"layers": [T // 2]}, "layer at two thirds": {"layers": [2 * T // 3]}}}


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


def gradient_flow(blank: Baseline, layer: int, positive: Float32, negative: Float32) -> Baseline:
    """Fit ODESteer at one block: `blank` with the activations it goes by, their weights and its unit of time.

    The unit is the distance of the sets' means, so that strength 1 is as long a way as that of actadd. The weights are
    scaled so that the gradient's length is 1 on average, which changes nothing but keeps half precision safe.

    Args:
        positive, negative: the block's outputs (n, d) and (m, d) at the prompts' last tokens.

    Raises:
        InputError: the activations do not tell the sets apart.
    """
    units = unit(np.concatenate([positive, negative]).astype(np.float64))
    weights = kernel_logistic_regression(
        (units @ units.T + OFFSET) ** 2, np.repeat([1.0, -1.0], [len(positive), len(negative)])
    )
    gradient = ((units @ units.T + OFFSET) * weights) @ units
    gradient -= (gradient * units).sum(axis=1, keepdims=True) * units
    length = np.linalg.norm(gradient, axis=1).mean()
    distance = np.zeros(blank.num_layers, np.float32)
    distance[layer] = np.linalg.norm(positive.mean(axis=0, dtype=np.float64) - negative.mean(axis=0, dtype=np.float64))
    if not (length > 0 and distance[layer] > 0):
        raise InputError(f"the output of layer {layer} does not tell the prompts apart: choose another layer")
    tensors = {
        "anchors": units.astype(np.float32),
        "weights": (weights / length).astype(np.float32),
        "distance": distance,
    }
    return replace(blank, tensors=tensors, active_layers=(layer,))


def kernel_logistic_regression(kernel: Float64, labels: Float64) -> Float64:
    """Weights w (n,) of the rows of a kernel matrix (n, n) in h = sum_i w_i kernel_i + constant, for labels 1 or -1.

    Minimises the loss of `logistic_regression` over all functions of the kernel's space.
    """
    values, vectors = np.linalg.eigh(kernel)
    kept = values > values[-1] * 1e-12
    scale = np.sqrt(values[kept])
    solution, _ = logistic_regression((vectors[:, kept] * scale)[None], labels)
    return np.asarray(vectors[:, kept] @ (solution[0] / scale))
