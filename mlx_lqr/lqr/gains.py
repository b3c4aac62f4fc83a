"""g_k = K_k v_k of every layer, from a contrast and Jacobians: what a controller is assembled from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mlx_lqr.backends.protocol import Differentiable, LinearAlgebra, Matrix, Progress, Trace
from mlx_lqr.lqr.contrast import Contrast
from mlx_lqr.lqr.riccati import Product, Weights, feature_sweep, sweep


def state_feedback(
    descending: Iterable[tuple[int, Matrix]],
    found: Contrast,
    weights: Weights,
    layers: tuple[int, ...],
    algebra: LinearAlgebra | None,
) -> Matrix:
    """g_k = K_k v_k for the state cost from the Jacobians (k, A_k), zero where there is no control: (T, d)"""
    unit = found.unit_direction
    feedback = np.zeros_like(unit)
    for k, gain in sweep(descending, weights, layers, algebra=algebra):
        feedback[k] = gain @ unit[k]
    return feedback


def aims(found: Contrast) -> tuple[Matrix, Matrix, Matrix]:
    """v_k (T, d), mu_k (T,) and e_T (d,)"""
    return found.unit_direction, found.magnitude, found.output_direction


def pull_back(model: Differentiable, traces: Sequence[Trace]) -> Product:
    """(k, X) -> A_k' X with the Jacobians averaged over traces, none of which is ever formed."""

    def product(k: int, X: Matrix) -> Matrix:
        return np.mean([model.vjp(trace, k, X.T.astype(np.float32)) for trace in traces], axis=0).T

    return product


def feature_feedback(
    product: Product,
    unit: Matrix,
    magnitudes: Matrix,
    output_direction: Matrix,
    weights: Weights,
    layers: tuple[int, ...],
    progress: Progress | None = None,
) -> Matrix:
    """g_k for the feature cost from v_k (T, d), mu_k (T,) and e_T (d,), zero where there is no control: (T, d)"""
    from threadpoolctl import ThreadpoolController

    T = len(unit)
    output_magnitude = float(np.linalg.norm(output_direction))
    directions = np.vstack([unit, output_direction / (output_magnitude or 1.0)])
    feedback = np.zeros(unit.shape)
    # NumPy's own threads are of no use to these small products, and spin on the cores that the backend then waits for.
    with ThreadpoolController().select(internal_api="openblas").limit(limits=1):
        for k, gain in feature_sweep(product, directions, np.append(magnitudes, output_magnitude), weights, layers):
            feedback[k] = gain
            if progress:
                progress("Gains", T - k, T - layers[0])
    return feedback
