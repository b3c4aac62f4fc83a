"""The barrier function of ODESteer (Zhao et al. 2026, arXiv 2602.17560): how much likelier an activation is among the
positive prompts than among the negative ones.

The log-density ratio h(y) is that of a logistic regression on all products of two of the entries of u = y / |y|, on
these entries and on 1, as the kernel (u . u' + OFFSET)^2 weighs them. The authors sketch these features at random
(Count Sketch); here the same regression is solved exactly in the prompts' span, where h(y) = sum_i w_i (u . u_i +
OFFSET)^2 + constant.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mlx_lqr.backends.protocol import Float32
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.contrast import unit
from mlx_lqr.methods.baseline import Baseline
from mlx_lqr.methods.laws.gradient_flow import OFFSET
from mlx_lqr.methods.probes import Float64, logistic_regression


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
