"""Tokens from logits in MLX: the filters of `Sampling`, and random numbers of each sequence's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_lqr.backends.borrowed import check_borrowed
from mlx_lqr.backends.mlx.device import on_gpu
from mlx_lqr.backends.mlx.framework import MLXFramework
from mlx_lqr.backends.mlx.library import filters
from mlx_lqr.backends.protocol import Sampling
from mlx_lqr.backends.sampling import LIKELIEST, Sampler


class MLXSampler(Sampler):
    """Draws with a key for each sequence."""

    def __init__(self, framework: MLXFramework, sampling: Sampling) -> None:
        super().__init__(framework, sampling)
        self._keys: mx.array | None = None
        """(B, 2), made when the number of sequences is known."""

    def _streams(self) -> Sequence[mx.array]:
        return () if self._keys is None else (self._keys,)

    def _join_streams(self, other: Any, rows: int, others: int) -> None:
        self._keys = mx.concatenate([self._of(rows), other._of(others)])

    def _keep_streams(self, rows: Sequence[int]) -> None:
        if self._keys is not None:
            self._keys = self._keys[mx.array(list(rows))]

    def _likeliest(self, logits: mx.array) -> mx.array:
        return mx.argmax(logits, axis=-1).astype(mx.int32)

    def _filtered(self, logits: mx.array) -> mx.array:
        check_borrowed("mlx sampling")
        library, sampling = filters(), self.sampling
        logits = logits.astype(mx.float32)  # first: 16 bits round what is subtracted
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if sampling.top_p < 1:
            logprobs = nucleus(logprobs, sampling.top_p)
        if sampling.min_p > 0:
            logprobs = library.apply_min_p(logprobs, sampling.min_p)
        if 0 < sampling.top_k < logits.shape[-1]:
            logprobs = library.apply_top_k(logprobs, sampling.top_k)
        return logprobs - logprobs.max(axis=-1, keepdims=True)

    def _drawn(self, logprobs: mx.array) -> mx.array:
        split = mx.vmap(mx.random.split)(self._of(len(logprobs)))  # (B, 2, 2)
        self._keys = split[:, 0]
        pick: Callable[[mx.array, mx.array], mx.array] = mx.vmap(lambda row, key: mx.random.categorical(row, key=key))
        return pick(logprobs, split[:, 1]).astype(mx.int32)

    def _of(self, rows: int) -> mx.array:
        """The keys of so many sequences: (rows, 2)."""
        if self._keys is None:
            self._keys = mx.stack([mx.random.key(self._seed + row) for row in range(rows)])
        return self._keys


def nucleus(logprobs: mx.array, top_p: float) -> mx.array:
    """Log-probabilities (B, V) with minus infinity for all but the likeliest tokens that have `top_p` of the mass.

    The same tokens as mlx-lm's `apply_top_p` keeps, whose sort of a whole vocabulary takes longer on the CPU than the
    model does. Here the likeliest are sorted alone; whether they have mass enough must be known at once, so that this
    waits for the logits, which on a GPU, where sorting is quick, would cost more than it saves.
    """
    apply_top_p: Callable[[mx.array, float], mx.array] = filters().apply_top_p
    if on_gpu():
        return apply_top_p(logprobs, top_p)
    count = min(LIKELIEST, logprobs.shape[-1])
    ascending = mx.sort(mx.topk(logprobs, count, axis=-1), axis=-1)
    mass = mx.cumsum(mx.exp(ascending), axis=-1, reverse=True)  # of each and of those above it
    if count < logprobs.shape[-1] and not mx.all(mass[:, 0] > top_p).item():
        return apply_top_p(logprobs, top_p)
    outside = (mass - mx.exp(ascending) >= top_p).sum(axis=-1, keepdims=True)
    least = mx.take_along_axis(ascending, mx.minimum(outside, count - 1), axis=-1)
    return mx.where(logprobs < least, -mx.inf, logprobs)
