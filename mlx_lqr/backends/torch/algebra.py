"""The Riccati recursion's matrices as torch tensors: on a GPU, where a wide model's gains take seconds."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import DTypeLike

from mlx_lqr.backends.protocol import Matrix
from mlx_lqr.backends.torch.framework import memory_for


class TorchAlgebra:
    """The `LinearAlgebra` protocol on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def computing(self) -> AbstractContextManager[None]:
        return memory_for("the gains")

    def matrix(self, values: Matrix, dtype: DTypeLike) -> torch.Tensor:
        kind = torch.float64 if np.dtype(dtype) == np.float64 else torch.float32
        return torch.as_tensor(np.ascontiguousarray(values), device=self._device).to(kind)

    def numpy(self, matrix: torch.Tensor) -> Matrix:
        return matrix.cpu().numpy()

    def is_finite(self, matrix: torch.Tensor) -> bool:
        return bool(torch.isfinite(matrix).all())

    def add_to_diagonal(self, matrix: torch.Tensor, value: float) -> None:
        matrix.diagonal().add_(value)

    def inverse(self, matrix: torch.Tensor) -> tuple[torch.Tensor, float]:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed):
            return matrix, 0.0
        inverse = torch.cholesky_inverse(factor)
        norm, inverse_norm = (torch.linalg.matrix_norm(one, ord=1) for one in (matrix, inverse))
        return inverse, 1.0 / float(norm * inverse_norm)
