"""Linear algebra in NumPy, for the Riccati recursion on backends that do not bring their own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import DTypeLike

from mlx_lqr.backends.protocol import Matrix


class NumPyAlgebra:
    """NumPy, and LAPACK through SciPy."""

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def matrix(self, values: Matrix, dtype: DTypeLike) -> Matrix:
        return np.asarray(values, dtype=dtype)

    def numpy(self, matrix: Matrix) -> Matrix:
        return matrix

    def is_finite(self, matrix: Matrix) -> bool:
        return bool(np.all(np.isfinite(matrix)))

    def add_to_diagonal(self, matrix: Matrix, value: float) -> None:
        matrix[np.diag_indices_from(matrix)] += value

    def inverse(self, matrix: Matrix) -> tuple[Matrix, float]:
        from scipy.linalg import lapack

        routines = ("potrf", "pocon", "potri")
        letter = "d" if matrix.dtype == np.float64 else "s"
        potrf, pocon, potri = (getattr(lapack, letter + name) for name in routines)
        norm = np.abs(matrix).sum(axis=0).max()
        factor, failed = potrf(matrix, lower=True, overwrite_a=True)
        condition = 0.0 if failed else float(pocon(factor, norm, uplo="L")[0])
        lower, _ = potri(factor, lower=True, overwrite_c=True)
        inverse = np.tril(lower)
        inverse += np.tril(lower, -1).T
        return inverse, condition
