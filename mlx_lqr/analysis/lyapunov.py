"""The error system dz_{k+1} = F_k dz_k + r_k, k = 0..T-1, and bounds of it. NumPy and SciPy only, no model.

F_k is a closed loop: A_k - g_k v_k' where a controller steers one feature, A_k - K_k where it feeds back the whole
state. With the weights P_T = I, P_k = F_k' P_{k+1} F_k + I, |x|^2_{P_k} = x' P_k x = sum_{j >= k} |Phi(j, k) x|^2 adds
up what an error x at layer k becomes in the later layers, Phi(j, k) = F_{j-1} ... F_k. In these norms every step
contracts, stable or not: |F_k x|^2_{P_{k+1}} = x' P_k x - x' x, so that the induced norm is exactly

    |F_k|_{P_k -> P_{k+1}} = sqrt(1 - 1 / lambda_max(P_k)) < 1.

Instability shows as large weights. With |r_i|_{P_{i+1}} <= c_i |dz_i|_{P_i} + (L_i / 2) |dz_i|^2_{P_i},

    |dz_k|_{P_k} <= |Phi(k, 0)| |dz_0|_{P_0}
                    + sum_{i < k} |Phi(k, i + 1)| (c_i |dz_i|_{P_i} + (L_i / 2) |dz_i|^2_{P_i}),

with |Phi(k, i)| the induced norm from P_i to P_k; c_i = 0 gives the bound of arXiv 2604.19018. For a feature the row
vector v' replaces the first factor: |v' Phi(k, i) x| <= |Phi(k, i)' v|_{P_i^-1} |x|_{P_i}, which is tighter than
|v|_{P_k^-1} |Phi(k, i)| and only needs products with vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_lqr.backends.protocol import Matrix
from mlx_lqr.errors import InputError

Float64 = NDArray[np.float64]
_DENSE = 64
"""Up to this width, eigenvalues are computed densely."""
_RUNAWAY = 1e100
"""A bound beyond it counts as infinite. Until then it is finite, so that 0 times infinity does not make it NaN."""


@dataclass(frozen=True, eq=False)
class LyapunovStep:
    """One layer of the backward sweep; the matrices are (d, d) float64."""

    layer: int
    closed_loop: Float64
    """F_k"""
    factor: Float64
    """lower triangular, P_k = factor factor'"""
    next_factor: Float64
    """the same of P_{k+1}"""
    growth: float
    """lambda_max(F_k' P_{k+1} F_k)"""
    to_output: float
    """|Phi(T, k)| from P_k to P_T = I, exactly"""

    @property
    def largest_weight(self) -> float:
        """lambda_max(P_k)"""
        return 1 + self.growth

    @property
    def step_norm(self) -> float:
        """|F_k| from P_k to P_{k+1}, exactly: sqrt(1 - 1 / lambda_max(P_k)), computed without the subtraction."""
        return float(np.sqrt(self.growth / (1 + self.growth)))


def lyapunov_sweep(closed_loop: Iterable[tuple[int, Matrix]]) -> Iterator[LyapunovStep]:
    """The weights of every layer, consuming (k, F_k) from the last layer to the first, as Jacobians are streamed.

    Only a few (d, d) float64 matrices are in memory, however many layers there are.

    Raises:
        InputError: the weights overflow (the layer is named).
    """
    from scipy.linalg import cholesky

    P = beyond = next_factor = np.empty((0, 0))
    for k, given in closed_loop:
        F = np.asarray(given, np.float64)
        if not len(P):
            P = beyond = next_factor = np.eye(len(F))
        with np.errstate(over="ignore", invalid="ignore"):
            P = F.T @ P @ F
            P = (P + P.T) / 2
            beyond = F.T @ beyond @ F  # Phi(T, k)' Phi(T, k)
        if not np.all(np.isfinite(P)):
            raise InputError(f"the Lyapunov weights overflow at layer {k}: the closed loop amplifies without bound")
        growth = largest_eigenvalue(P)
        P[np.diag_indices_from(P)] += 1
        factor = cholesky(P, lower=True)
        yield LyapunovStep(k, F, factor, next_factor, growth, _relative_norm(beyond, factor))
        next_factor = factor


def largest_eigenvalue(matrix: Matrix | Callable[[Matrix], Matrix], width: int | None = None) -> float:
    """The largest eigenvalue of a symmetric positive semidefinite matrix (d, d), or of x -> matrix x with d = `width`.

    By Lanczos iterations to a tolerance of 1e-9, which takes a few products with vectors and no factorisation; densely
    if they do not converge.
    """
    from scipy.linalg import eigvalsh
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    d = width or len(matrix)  # type: ignore[arg-type]
    apply = matrix if callable(matrix) else lambda x: matrix @ x
    if d > _DENSE:
        try:
            operator = LinearOperator((d, d), matvec=apply, dtype=np.float64)
            start = np.random.default_rng(0).standard_normal(d)
            return float(max(0.0, eigsh(operator, k=1, tol=1e-9, v0=start, return_eigenvectors=False)[0]))
        except ArpackNoConvergence:
            pass
    dense = np.column_stack([apply(x) for x in np.eye(d)]) if callable(matrix) else matrix
    return float(max(0.0, eigvalsh((dense + dense.T) / 2, subset_by_index=[d - 1, d - 1])[0]))


def spectral_norm(matrix: Matrix) -> float:
    """|matrix|_2"""
    return float(np.sqrt(largest_eigenvalue(lambda x: matrix.T @ (matrix @ x), matrix.shape[1])))


def _relative_norm(form: Matrix, factor: Matrix) -> float:
    """max of sqrt(x' form x / x' P x), P = factor factor'."""
    from scipy.linalg import solve_triangular

    def apply(x: Matrix) -> Matrix:
        pulled = solve_triangular(factor, x, lower=True, trans=1, check_finite=False)
        return np.asarray(solve_triangular(factor, form @ pulled, lower=True, check_finite=False))

    return float(np.sqrt(largest_eigenvalue(apply, len(form))))


def weighted_norm(factor: Matrix, vectors: Matrix) -> Float64:
    """|x|_P for the rows x of `vectors` (..., d), P = factor factor': (...)"""
    return np.asarray(np.linalg.norm(vectors @ factor, axis=-1), np.float64)


def dual_norm(factor: Matrix, columns: Matrix) -> Float64:
    """|c|_{P^-1} for the columns c of `columns` (d, n): (n,)"""
    from scipy.linalg import solve_triangular

    return np.asarray(np.linalg.norm(solve_triangular(factor, columns, lower=True), axis=0), np.float64)


def transition_products(steps: Sequence[float] | Float64) -> Float64:
    """An upper bound of every |Phi(k, i)|, the product of the steps' norms: (T + 1, T + 1), entry [k, i], 0 for i > k.

    The exact norms would need the product of the matrices for every pair of layers.
    """
    T = len(steps)
    table = np.zeros((T + 1, T + 1))
    table[0, 0] = 1
    for k in range(T):
        table[k + 1, : k + 1] = steps[k] * table[k, : k + 1]
        table[k + 1, k + 1] = 1
    return table


def error_bound(transition: Float64, initial: Float64 | float, disturbance: Float64) -> Float64:
    """The bound of every layer: transition[k, 0] initial + sum_{i < k} transition[k, i + 1] disturbance_i.

    Args:
        transition: (T + 1, T + 1) norms of Phi(k, i), or of v_k' Phi(k, i) for the bound of a feature.
        initial: |dz_0|_{P_0}, a number or (...).
        disturbance: a bound of |r_i|_{P_{i+1}}: (..., T).

    Returns:
        (..., T + 1)
    """
    with np.errstate(over="ignore"):
        return np.asarray(initial)[..., None] * transition[:, 0] + _capped(disturbance) @ transition[:, 1:].T


def remainder_bound(mismatch: Float64, curvature: Float64, error: Float64) -> Float64:
    """c_i |dz_i| + (L_i / 2) |dz_i|^2 for errors |dz_i|_{P_i} of every layer i < T: (..., T)."""
    with np.errstate(over="ignore"):
        return mismatch * error + curvature / 2 * error**2


def prior_bound(
    transition: Float64, forced: Float64, mismatch: Float64, curvature: Float64, rounding: Float64 | float = 0.0
) -> tuple[Float64, Float64]:
    """The bound without knowing the errors: of the deviation from a linear prediction, before anything is run.

    The error is e_k = p_k + d_k, p_{k+1} = F_k p_k + w_k the linear prediction under the known input w_k, and d_0 = 0,
    d_{k+1} = F_k d_k + r_k(e_k). So |e_i| <= |p_i| + (the bound of |d_i|), from layer to layer.

    Args:
        transition: (T + 1, T + 1), as for `error_bound`.
        forced: |p_k|_{P_k}: (..., T + 1).
        mismatch, curvature: c_i and L_i: (T,).
        rounding: a further disturbance of fixed size, a number or (..., T).

    Returns:
        The bound of |d_k|_{P_k} (..., T + 1), and the disturbances (..., T) that it is made of. Both are infinite where
        the quadratic term grows without limit.
    """
    T = len(mismatch)
    bound = np.zeros(forced.shape)
    disturbance = np.zeros((*forced.shape[:-1], T))
    fixed = np.broadcast_to(rounding, disturbance.shape)
    for k in range(T):
        allowed = remainder_bound(mismatch[k], curvature[k], forced[..., k] + bound[..., k])
        disturbance[..., k] = _capped(allowed + fixed[..., k])
        bound[..., k + 1] = disturbance[..., : k + 1] @ transition[k + 1, 1 : k + 2]
    return np.where(bound < _RUNAWAY, bound, np.inf), np.where(disturbance < _RUNAWAY, disturbance, np.inf)


def _capped(disturbance: Float64) -> Float64:
    return np.minimum(np.nan_to_num(disturbance, nan=_RUNAWAY, posinf=_RUNAWAY), _RUNAWAY)
