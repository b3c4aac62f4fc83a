"""What the Riccati recursion asks of matrices, so that it may run in NumPy or on a backend's device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

Matrix = NDArray[np.floating]


class LinearAlgebra(Protocol):
    """Square matrices of some array library, which has the operators `@ + - * .T` in common with NumPy."""

    def computing(self) -> AbstractContextManager[None]:
        """Around all that is done with matrices: a failure to get memory for them leaves it as an `InputError`."""

    def matrix(self, values: Matrix, dtype: DTypeLike) -> Any:
        """The values (d, d) as a matrix of this library, in float64 or float32."""

    def numpy(self, matrix: Any) -> Matrix:
        """A matrix as a NumPy array."""

    def is_finite(self, matrix: Any) -> bool:
        """Whether every value is finite."""

    def add_to_diagonal(self, matrix: Any, value: float) -> None:
        """Add a number to every diagonal element, in place."""

    def inverse(self, matrix: Any) -> tuple[Any, float]:
        """The inverse of a symmetric positive definite matrix, and its reciprocal condition number in the 1-norm.

        The latter is 0 where the matrix is not positive definite; then the former means nothing. The matrix itself may
        be overwritten.
        """


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
