"""NumPy under the names of `Framework`: what comes out of llama.cpp, and the laws inside it, are NumPy arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from mlx_lqr.backends.framework import Framework
from mlx_lqr.backends.protocol import Array, Float32
from mlx_lqr.backends.turn import Turn


class NumPyFramework(Framework):
    """For one model, whose context one thread at a time may use.

    Args:
        device: what computes.
    """

    dtype_name = "float32"

    def __init__(self, device: str) -> None:
        self.device = device
        self._own_turn = Turn()

    @property
    def device_name(self) -> str:
        return self.device

    def floats(self, values: np.ndarray) -> Float32:
        return np.ascontiguousarray(values, np.float32)

    def renewed(self, array: Array, values: np.ndarray) -> Float32:
        return self.floats(values)

    def integers(self, numbers: Any) -> np.ndarray:
        return np.asarray(numbers, np.int64)

    def tokens(self, tokens: Array | Sequence[int]) -> np.ndarray:
        return np.maximum(self.integers(tokens), 0)

    def arange(self, count: int) -> np.ndarray:
        return np.arange(count)

    def none_seen(self, rows: int, vocabulary: int) -> np.ndarray:
        return np.zeros((rows, vocabulary), np.bool_)

    def added(self, array: Array, columns: Array, values: Array) -> np.ndarray:
        sums: np.ndarray = array.copy()
        np.add.at(sums, (np.arange(len(sums))[:, None], columns), np.asarray(values, np.float32))
        return sums

    def float32(self, array: Array) -> Float32:
        return np.asarray(array, np.float32)

    def numpy(self, array: Array) -> Float32:
        return np.asarray(array, np.float32)

    def stack(self, arrays: Sequence[Array], axis: int) -> np.ndarray:
        return np.stack(arrays, axis)

    def concatenate(self, arrays: Sequence[Array], axis: int) -> np.ndarray:
        return np.concatenate(arrays, axis)

    def where(self, condition: Array, a: Array, b: Array | int) -> np.ndarray:
        return np.where(condition, a, b)

    def add_product(self, c: Array, a: Array, b: Array) -> np.ndarray:
        return c + a @ b

    def energy(self, z: Array) -> Float32:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.square(z, dtype=np.float32).sum(axis=-1)

    def is_finite(self, array: Array) -> bool:
        return bool(np.isfinite(array).all())

    def log_probabilities(self, logits: Array, tokens: Sequence[int]) -> Float32:
        return log_softmax(logits)[np.arange(len(tokens)), self.tokens(tokens)]

    def likeliest(self, logits: Array, count: int) -> tuple[np.ndarray, Float32]:
        logprobs = log_softmax(logits)
        order = np.argsort(-logprobs, axis=-1, kind="stable")[:, :count]
        return order, np.take_along_axis(logprobs, order, axis=-1)

    def compute(self, arrays: Iterable[Array]) -> None:
        """Everything is computed at once."""

    def start(self, arrays: Iterable[Array]) -> None:
        """Everything is computed at once."""

    def computing(self, what: str) -> AbstractContextManager[None]:
        return self._own_turn


def log_softmax(logits: np.ndarray) -> Float32:
    """log p (n, V) by logits (n, V); NaN where they are not finite."""
    with np.errstate(invalid="ignore"):
        relative = logits - logits.max(axis=-1, keepdims=True)
        return (relative - np.log(np.exp(relative).sum(axis=-1, keepdims=True))).astype(np.float32)
