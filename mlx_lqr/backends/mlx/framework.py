"""MLX's names for what recording and decoding are made of (see `Framework`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_lqr.backends.framework import Framework
from mlx_lqr.backends.mlx.blocks import ClassHooks
from mlx_lqr.backends.mlx.device import device_name, on_gpu
from mlx_lqr.backends.protocol import Float32
from mlx_lqr.backends.turn import Turn


class MLXFramework(Framework):
    """MLX, which computes lazily, where it chooses.

    Args:
        dtype: of the residual stream.
        hooks: how they are placed on the model's blocks.
    """

    turn = Turn()

    def __init__(self, dtype: mx.Dtype, hooks: type[ClassHooks] = ClassHooks) -> None:
        self.dtype = dtype
        self.hooks = hooks

    @classmethod
    def of(cls, block: nn.Module) -> MLXFramework:
        """For a model with such blocks; norms are never packed, so that theirs is the dtype of the residual stream."""
        parameters = tree_flatten(block.parameters())
        return cls(next(weight.dtype for name, weight in parameters if name.endswith("norm.weight")))

    @property
    def device_name(self) -> str:
        return device_name()

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).rpartition(".")[2]

    def floats(self, values: np.ndarray) -> mx.array:
        return mx.array(values).astype(self.dtype)

    def renewed(self, array: mx.array, values: np.ndarray) -> mx.array:
        array[...] = self.floats(values)
        return array

    def integers(self, numbers: Any) -> mx.array:
        return mx.array(numbers, mx.int32)

    def tokens(self, tokens: mx.array | Sequence[int]) -> mx.array:
        return tokens if isinstance(tokens, mx.array) else self.integers(tokens)

    def arange(self, count: int) -> mx.array:
        return mx.arange(count)

    def none_seen(self, rows: int, vocabulary: int) -> mx.array:
        return mx.zeros((rows, vocabulary), mx.bool_)

    def added(self, array: mx.array, columns: mx.array, values: mx.array) -> mx.array:
        return array.at[mx.arange(len(array))[:, None], columns].add(values)

    def float32(self, array: mx.array) -> mx.array:
        return array.astype(mx.float32)

    def numpy(self, array: mx.array) -> Float32:
        return np.asarray(array.astype(mx.float32))

    def stack(self, arrays: Sequence[mx.array], axis: int) -> mx.array:
        return mx.stack(list(arrays), axis)

    def concatenate(self, arrays: Sequence[mx.array], axis: int) -> mx.array:
        return mx.concatenate(list(arrays), axis)

    def where(self, condition: mx.array, a: mx.array, b: mx.array | int) -> mx.array:
        return mx.where(condition, a, b)

    def add_product(self, c: mx.array, a: mx.array, b: mx.array) -> mx.array:
        return mx.addmm(c, a, b)

    def energy(self, z: mx.array) -> mx.array:
        return energy(z)

    def is_finite(self, array: mx.array) -> bool:
        return bool(mx.all(mx.isfinite(array)).item())

    def log_probabilities(self, logits: mx.array, tokens: Sequence[int]) -> Float32:
        chosen = mx.take_along_axis(logits, self.integers(list(tokens))[:, None], axis=-1)[:, 0]
        return self.numpy(chosen - _log_sum_exp(logits)[:, 0])

    def likeliest(self, logits: mx.array, count: int) -> tuple[mx.array, mx.array]:
        logprobs = logits - _log_sum_exp(logits)
        largest = mx.argpartition(-logprobs, min(count, logits.shape[-1] - 1), axis=-1)[:, :count]
        values = mx.take_along_axis(logprobs, largest, axis=-1)
        order = mx.argsort(-values, axis=-1)
        return mx.take_along_axis(largest, order, axis=-1), mx.take_along_axis(values, order, axis=-1)

    def compute(self, arrays: Iterable[mx.array]) -> None:
        mx.eval(list(arrays))

    def start(self, arrays: Iterable[mx.array]) -> None:
        mx.async_eval(list(arrays))

    def leave_thread(self) -> None:
        """Or MLX may abort the process when it ends, over streams of a thread that has gone."""
        with self.turn:
            mx.synchronize()
            mx.clear_streams()

    def computing(self, what: str) -> AbstractContextManager[object]:
        return self.turn


def _log_sum_exp(logits: mx.array) -> mx.array:
    """log sum exp of logits (n, V) in float32: (n, 1)

    On a CPU MLX adds one number after another, which over a vocabulary is off by up to 3e-4; NumPy adds in pairs.
    """
    if on_gpu():
        return mx.logsumexp(logits, axis=-1, keepdims=True)
    largest = logits.max(axis=-1, keepdims=True)
    shifted = np.array(logits - largest)
    return largest + mx.array(np.log(np.exp(shifted, out=shifted).sum(axis=-1, keepdims=True)))


def energy(z: mx.array) -> mx.array:
    """|z|^2 (...) of activations (..., d), in float32."""
    return mx.square(z.astype(mx.float32)).sum(axis=-1)
