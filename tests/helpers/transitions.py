"""The exact norms |Phi(k, i)| of an error system, against which the library's bounds are checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh


def transition_norms(closed_loop: Sequence[np.ndarray]) -> NDArray[np.float64]:
    """Every |Phi(k, i)| from P_i to P_k exactly: (T + 1, T + 1), entry [k, i], 0 for i > k.

    Holds all T matrices and solves T^2 / 2 eigenvalue problems.
    """
    T = len(closed_loop)
    F = [np.asarray(matrix, np.float64) for matrix in closed_loop]
    weights = [np.eye(len(F[0]))]
    for k in reversed(range(T)):
        weights.insert(0, F[k].T @ weights[0] @ F[k] + np.eye(len(F[0])))
    table = np.eye(T + 1)
    for k in range(T + 1):
        image = weights[k]
        for i in reversed(range(k)):
            image = F[i].T @ image @ F[i]
            image = (image + image.T) / 2
            top = [len(image) - 1] * 2
            table[k, i] = np.sqrt(max(0.0, eigh(image, weights[i], eigvals_only=True, subset_by_index=top)[0]))
    return table
