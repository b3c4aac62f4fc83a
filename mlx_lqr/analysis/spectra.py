"""How alike two Jacobians are: sim_m(W, X) = |(U_W S_W)' (U_X S_X)|_* / (|S_W|_F |S_X|_F), over the top m modes.

The spectral similarity of arXiv 2604.19018: |.|_* is the nuclear norm, the columns of U_W (d, m) and the diagonal of
S_W (m, m) are the first m left singular vectors and values. It is 1 for W = X, at most 1 because the nuclear norm of a
product is at most the product of the Frobenius norms, and 0 if the two dominant subspaces are orthogonal. For random
subspaces it grows with m, so every number needs a baseline.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_lqr.backends.protocol import Float32, Matrix


def spectral_similarity(W: Matrix, X: Matrix) -> float:
    """sim_m of two matrices from their scaled dominant modes U S, each (d, m): see `dominant_modes`."""
    if not (W.any() and X.any()):
        return 0.0
    inner = np.linalg.svd(W.T @ X, compute_uv=False)
    return float(inner.sum() / (np.linalg.norm(W) * np.linalg.norm(X)))  # |U S|_F = |S|_F


def dominant_modes(jacobian: Matrix, modes: int) -> tuple[Float32, Float32]:
    """All singular values (d,) of a (d, d) matrix; its first left singular vectors, scaled by them (d, modes)."""
    U, S, _ = np.linalg.svd(jacobian)
    m = min(modes, len(S))
    return S, U[:, :m] * S[:m]


def similarity_matrix(scaled: Sequence[Matrix], modes: int) -> Float32:
    """sim_m of every pair of matrices given by their scaled modes: (n, n), with ones on the diagonal."""
    n = len(scaled)
    result = np.eye(n, dtype=np.float32)
    for i in range(n):
        for j in range(i):
            result[i, j] = result[j, i] = spectral_similarity(scaled[i][:, :modes], scaled[j][:, :modes])
    return result


def mean_of_pairs(matrix: Matrix) -> float:
    """The mean of the off-diagonal entries of a symmetric matrix (n, n); NaN for n = 1."""
    n = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (n * (n - 1))) if n > 1 else float("nan")


def rotated(scaled: Matrix, random: np.random.Generator) -> Matrix:
    """The same singular values with uniformly random directions: the baseline that keeps the spectrum (d, m)."""
    basis, _ = np.linalg.qr(random.standard_normal(scaled.shape))
    return basis * np.linalg.norm(scaled, axis=0)


def gaussian_modes(width: int, modes: int, random: np.random.Generator) -> Matrix:
    """The scaled modes of a matrix (d, d) of independent normal entries: the baseline without structure (d, m)."""
    return dominant_modes(random.standard_normal((width, width)), modes)[1]
