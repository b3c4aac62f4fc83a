"""Layer Jacobians -> feedback gains: the finite-horizon linear-quadratic regulator. No model, no tensor framework.

The linear time-varying system dz_{k+1} = A_k dz_k + u_k, k = 0..T-1, and the cost
sum_k (dz_k' Q dz_k + u_k' R u_k) + dz_T' Qf dz_T with Q = qI, R = rI, Qf = qf I have the optimal feedback u_k = -K_k
dz_k,

    S_T = Qf,   M_k = rI - r^2 (S_{k+1} + rI)^-1,   K_k = M_k A_k / r,   S_k = Q + A_k' M_k A_k.

M_k equals S - S (S + R)^-1 S, so this is the textbook recursion (K_k = (S_{k+1} + R)^-1 S_{k+1} A_k), in the form
that keeps S symmetric and subtracts nothing large. In float32 the textbook form is off by up to 3.5 % of K_k v over 30
layers. Only q/r and qf/r matter: scaling q, r and qf together changes no gain.

Where blocks hand on more than z at a token, the state is s_k = (z_k, side_k) in R^(d + m). Control acts on z alone,
ds_{k+1} = A_k ds_k + B u_k with B = [I; 0], and z alone is in the cost. Then

    M_k = S_{k+1} - S_{k+1} B (B' S_{k+1} B + rI)^-1 B' S_{k+1},   K_k = B' M_k A_k / r,   S_k = B Q B' + A_k' M_k A_k.

The paper's control is free, a push in any direction. It may also be kept to one direction b_k (d,) a layer, u_k =
-b_k (b_k' S_{k+1} b_k + r)^-1 b_k' S_{k+1} A_k dz_k: the same equations with B = b_k (B = [b_k; 0]).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from mlx_lqr.backends.protocol import LinearAlgebra, Matrix
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.algebra import NumPyAlgebra
from mlx_lqr.lqr.layers import check_layers

Product = Callable[[int, Matrix], Matrix]

WEIGHT = 10.0
"""The default q/r and qf/r. The paper's 0.1 controls less at the same damage (docs/comparison.md)."""


@dataclass(frozen=True)
class Weights:
    """The weights of the cost: q on the state, r on the control, qf on the final state."""

    q: float = WEIGHT
    r: float = 1.0
    qf: float = WEIGHT

    def __post_init__(self) -> None:
        for name, value in (("q", self.q), ("r", self.r), ("qf", self.qf)):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, not {value!r}")
        if self.q < 0 or self.qf < 0:
            raise InputError(f"q and qf must not be negative (q = {self.q:g}, qf = {self.qf:g})")
        if self.r <= 0:
            raise InputError(f"r must be above zero (r = {self.r:g}): it is the price of control")
        if self.q == 0 and self.qf == 0:
            raise InputError("q and qf are both zero, and then doing nothing is optimal: give one of them a weight")


@dataclass(frozen=True, eq=False)
class Gains(Sequence[Matrix]):
    """The gains K_0..K_{T-1}, each (d, d + m), float64 unless `solve` was asked for less."""

    matrices: Sequence[Matrix]
    weights: Weights
    layers: tuple[int, ...]
    fingerprint: str = ""
    model_name: str = ""
    jacobian_prompts: int = 0

    def __len__(self) -> int:
        return len(self.matrices)

    @overload
    def __getitem__(self, layer: int) -> Matrix: ...
    @overload
    def __getitem__(self, layer: slice) -> Sequence[Matrix]: ...
    def __getitem__(self, layer: int | slice) -> Matrix | Sequence[Matrix]:
        return self.matrices[layer]

    def apply(self, layer: int, vectors: ArrayLike) -> Matrix:
        """K_k v for a vector (d,) or K_k V for columns (d, n), the side at rest."""
        columns = np.asarray(vectors, dtype=self.matrices[layer].dtype)
        return self.matrices[layer][:, : len(columns)] @ columns


def solve(
    jacobians: Sequence[Matrix],
    q: float = WEIGHT,
    r: float = 1.0,
    qf: float = WEIGHT,
    *,
    layers: Iterable[int] | None = None,
    dtype: DTypeLike = np.float64,
    algebra: LinearAlgebra | None = None,
) -> Gains:
    """The gains of every layer.

    Args:
        jacobians: A_0..A_{T-1}, each (d, d); `linearize` makes them. If they have a `width`, control and cost are of as
            many components of the state, the first.
        q, r, qf: weights of state, control and final state. Only the ratios q/r and qf/r matter.
        layers: where control may act (default: everywhere). Elsewhere K_k = 0 and S_k = Q + A_k' S_{k+1} A_k.
        dtype: precision of the recursion, float64 or float32.
        algebra: where to compute, such as a model's `algebra`, which uses its GPU; by default NumPy.

    Raises:
        InputError: weights or layers out of range, or a recursion that fails (the layer is named).
    """
    weights = Weights(q, r, qf)
    T = len(jacobians)
    chosen = check_layers(layers, T)
    descending = ((k, jacobians[k]) for k in reversed(range(T)))
    gains = dict(sweep(descending, weights, chosen, dtype, algebra, getattr(jacobians, "width", None)))
    return Gains(
        [gains[k] for k in range(T)],
        weights,
        chosen,
        getattr(jacobians, "fingerprint", ""),
        getattr(jacobians, "model_name", ""),
        getattr(jacobians, "prompt_count", 0),
    )


def sweep(
    jacobians: Iterable[tuple[int, Matrix]],
    weights: Weights,
    layers: Iterable[int],
    dtype: DTypeLike = np.float64,
    algebra: LinearAlgebra | None = None,
    width: int | None = None,
    pushes: Matrix | None = None,
) -> Iterator[tuple[int, Matrix]]:
    """Yield (k, K_k) from the last layer to the first, consuming (k, A_k) in that order; see `cost_to_go`.

    Only a few (d, d) matrices are in memory, however many layers there are.
    """
    return ((k, gain) for k, gain, _ in cost_to_go(jacobians, weights, layers, dtype, algebra, width, pushes))


def cost_to_go(
    jacobians: Iterable[tuple[int, Matrix]],
    weights: Weights,
    layers: Iterable[int],
    dtype: DTypeLike = np.float64,
    algebra: LinearAlgebra | None = None,
    width: int | None = None,
    pushes: Matrix | None = None,
) -> Iterator[tuple[int, Matrix, Any]]:
    """Yield (k, K_k, S_k): `sweep`, with the matrix for which ds_k' S_k ds_k is the lowest cost from layer k on.

    S_k is a matrix of `algebra`, by default a NumPy array.

    Args:
        width: d, how many components of the state, the first, are controlled and in the cost; by default all.
        pushes: b_k (T, d), the one direction of control at each layer; by default control is free.
    """
    chosen = frozenset(layers)
    algebra = algebra or NumPyAlgebra()
    S: Any = None
    for k, jacobian in jacobians:
        with algebra.computing():
            A = algebra.matrix(jacobian, dtype)
            if not algebra.is_finite(A):
                raise InputError(f"the Jacobian of layer {k} is not finite: compute it again in float32")
            d = A.shape[0] if width is None else width
            if S is None:
                S = algebra.matrix(weights.qf * np.diag(np.arange(A.shape[0]) < d), dtype)
            if k in chosen and pushes is not None:
                b = algebra.matrix(np.pad(pushes[k], (0, A.shape[0] - d))[:, None], dtype)
                Sb = S @ b
                row = Sb.T @ A / (weights.r + float(algebra.numpy(b.T @ Sb)[0, 0]))
                MA = S @ A - Sb @ row
                gain = np.outer(pushes[k], algebra.numpy(row)[0]).astype(dtype)
            elif k in chosen:
                MA = _controlled(S, d, weights.r, k, algebra, dtype) @ A
                gain = algebra.numpy(MA[:d] / weights.r)
            else:
                MA = S @ A
                gain = np.zeros((d, A.shape[1]), dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                S = A.T @ MA
                S = (S + S.T) / 2
            algebra.add_to_diagonal(S[:d, :d], weights.q)
            if not algebra.is_finite(S):
                raise InputError(f"the Riccati recursion overflows {np.dtype(dtype)} at layer {k}: lower q and qf")
        yield k, gain, S
        del jacobian, A, MA, gain  # so that only S is in memory while the next Jacobian is computed


def feature_sweep(
    apply_transposed: Product,
    directions: Matrix,
    magnitudes: Matrix,
    weights: Weights,
    layers: Iterable[int],
    side: int = 0,
    pushes: Matrix | None = None,
) -> Iterator[tuple[int, Matrix]]:
    """Yield (k, g_k = K_k v_k) from the last layer to the first for a cost on the feature alone.

    The cost is Q_k = (q / mu_k^2) v_k v_k', R_k = (r / mu_{k+1}^2) I, Qf = (qf / mu_T^2) v_T v_T': the feature's error
    and the control, each relative to the concept's magnitude. Then S_k = W_k W_k' exactly, with at most T - k + 1
    columns; no (d, d) matrix is formed. With W = W_{k+1}

        g_k = W (r_k I + W'W)^-1 (A_k' W)' v_k,   W_k = [A_k' W L, sqrt(q_k) v_k],   L L' = r_k (r_k I + W'W)^-1,

    so that the product A_k' W is all that is needed of A_k. Where m numbers are handed on beside z, v_k is (v_k, 0) and
    the first d rows of W, B'W, take the place of W in g_k and in W'W; where control is kept to b_k, B'W = b_k'W, and
    g_k is b_k times the number that comes out.

    Args:
        apply_transposed: (k, X) -> A_k' X for the columns of X (d + m, n).
        directions: unit vectors v_0..v_T: (T + 1, d); v_T belongs to the last block's output.
        magnitudes: mu_0..mu_T: (T + 1,). A layer with mu_k = 0 has no feature and adds nothing to the cost.
        weights: q, r and qf.
        layers: where control may act.
        side: m.
        pushes: b_k (T, d), unit vectors, the one direction of control at each layer; by default control is free.
    """
    chosen = frozenset(layers)
    d = np.shape(directions)[1]
    V = np.pad(np.asarray(directions, np.float64), ((0, 0), (0, side)))
    mu = np.asarray(magnitudes, np.float64)
    T = len(V) - 1
    W = math.sqrt(weights.qf) / mu[T] * V[T][:, None] if mu[T] > 0 else np.zeros((d + side, 0))
    for k in reversed(range(min(chosen), T)):
        gain = np.zeros(d)
        pulled = apply_transposed(k, W) if W.shape[1] else W
        if k in chosen and mu[k + 1] > 0 and W.shape[1]:
            r = weights.r / mu[k + 1] ** 2
            pushed = W[:d] if pushes is None else pushes[k][None] @ W[:d]
            eigenvalues, basis = np.linalg.eigh(pushed.T @ pushed)
            shrink = r / (r + np.maximum(eigenvalues, 0))
            gain = pushed @ (basis @ ((shrink / r) * (basis.T @ (pulled.T @ V[k]))))
            gain = gain if pushes is None else gain[0] * pushes[k]
            pulled = pulled @ (basis * np.sqrt(shrink))
        W = pulled
        if mu[k] > 0:
            W = np.column_stack([W, math.sqrt(weights.q) / mu[k] * V[k]])
        if not (np.all(np.isfinite(W)) and np.all(np.isfinite(gain))):
            raise InputError(f"the Riccati recursion overflows at layer {k}: lower q and qf, or raise r")
        yield k, gain


def _controlled(S: Any, d: int, r: float, layer: int, algebra: LinearAlgebra, dtype: DTypeLike) -> Any:
    """M, with rI - r^2 (B'SB + rI)^-1 for z by a Cholesky factorisation, refused where it is badly conditioned."""
    M = S[:d, :d] + 0
    algebra.add_to_diagonal(M, r)
    M, inverse_condition = algebra.inverse(M)
    if not inverse_condition > 10 * np.finfo(np.dtype(dtype)).eps:
        raise InputError(
            f"the Riccati recursion fails at layer {layer}: S + R is not positive definite or too badly conditioned in "
            f"{np.dtype(dtype)}; raise r, lower q and qf, or solve in float64"
        )
    if d == S.shape[0]:
        M *= -r * r
        algebra.add_to_diagonal(M, r)
        return M
    inverse, across, M = M, S[:d, d:], S + 0
    M[:d, d:] = r * (inverse @ across)
    M[d:, :d] = M[:d, d:].T
    M[d:, d:] -= across.T @ (inverse @ across)
    M[:d, :d] = -r * r * inverse
    algebra.add_to_diagonal(M[:d, :d], r)
    return M
