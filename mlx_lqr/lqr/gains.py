"""The gain g_k = K_k v_k of every layer, from a contrast and Jacobians: a controller is assembled from these.

A law reads v_k . z_k and takes the error to be dz_k = -alpha_k v_k. Where blocks hand on m numbers beside z, the
optimal control is u_k = -K_k (dz_k, dside_k), and of the gain K_k (d, d + m) the law keeps g_k = K_k (v_k, 0). What it
drops is -K_k (0, dside_k), the answer to what control of earlier layers has changed in the side; what u_k itself
changes there later on is in g_k.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import numpy as np

from mlx_lqr.backends.protocol import Differentiable, LinearAlgebra, Matrix, Progress, Trace
from mlx_lqr.lqr.contrast import Contrast
from mlx_lqr.lqr.riccati import Product, Weights, feature_sweep, sweep

Push = Literal["concept", "free"]
"""Where control may push: along the concept's own direction v_{k+1} at a block's output, or anywhere (the paper)."""
PUSH: Push = "concept"
"""The default: at equal damage there is more of a concept, and far more of a behaviour (docs/comparison.md)."""


def state_gains(
    descending: Iterable[tuple[int, Matrix]],
    contrast: Contrast,
    weights: Weights,
    layers: tuple[int, ...],
    algebra: LinearAlgebra | None,
    push: Push,
) -> Matrix:
    """g_k = K_k v_k for the state cost from the Jacobians (k, A_k), zero where nothing is controlled: (T, d)"""
    unit = contrast.unit_direction
    outputs = _outputs(unit, contrast.output_direction)[1:] if push == "concept" else None
    gains = np.zeros_like(unit)
    for k, gain in sweep(descending, weights, layers, algebra=algebra, width=unit.shape[1], pushes=outputs):
        gains[k] = gain[:, : unit.shape[1]] @ unit[k]
    return gains


def directions_of(contrast: Contrast) -> tuple[Matrix, Matrix, Matrix]:
    """v_k (T, d), mu_k (T,) and e_T (d,): what `feature_gains` takes."""
    return contrast.unit_direction, contrast.magnitude, contrast.output_direction


def side_of(model: Differentiable) -> int:
    """m, how many numbers blocks hand on beside the residual stream."""
    return model.state_size - model.hidden_size


def pull_back(model: Differentiable, traces: Sequence[Trace]) -> Product:
    """(k, X) -> A_k' X, averaged over the traces, without forming a Jacobian."""

    def product(k: int, X: Matrix) -> Matrix:
        return np.mean([model.vjp(trace, k, X.T.astype(np.float32)) for trace in traces], axis=0).T

    return product


def feature_gains(
    product: Product,
    unit: Matrix,
    magnitudes: Matrix,
    output_direction: Matrix,
    weights: Weights,
    layers: tuple[int, ...],
    progress: Progress | None = None,
    *,
    side: int,
    push: Push,
) -> Matrix:
    """g_k for the feature cost from v_k (T, d), mu_k (T,) and e_T (d,), zero where nothing is controlled: (T, d)

    Args:
        side: m, with which `product` takes columns (d + m,).
        push: where control may push.
    """
    T = len(unit)
    directions = _outputs(unit, output_direction)
    gains = np.zeros(unit.shape)
    # NumPy's threads do not help with products this small; while idle, they spin on cores that the backend needs.
    with _ONE_THREAD.limited():
        mu = np.append(magnitudes, np.linalg.norm(output_direction))
        outputs = directions[1:] if push == "concept" else None
        for k, gain in feature_sweep(product, directions, mu, weights, layers, side, outputs):
            gains[k] = gain
            if progress:
                progress("Gains", T - k, T - layers[0])
    return gains


def _outputs(unit: Matrix, output_direction: Matrix) -> Matrix:
    """v_0..v_T: (T + 1, d)"""
    return np.vstack([unit, output_direction / (float(np.linalg.norm(output_direction)) or 1.0)])


class _OneThread:
    """Keeps NumPy to one thread while anybody wants that: the setting is the process's, and callers may overlap."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callers = 0
        self._limit = ExitStack()

    @contextmanager
    def limited(self) -> Iterator[None]:
        from threadpoolctl import ThreadpoolController

        with self._lock:
            if not self._callers:
                self._limit.enter_context(ThreadpoolController().select(internal_api="openblas").limit(limits=1))
            self._callers += 1
        try:
            yield
        finally:
            with self._lock:
                self._callers -= 1
                if not self._callers:
                    self._limit.close()


_ONE_THREAD = _OneThread()
