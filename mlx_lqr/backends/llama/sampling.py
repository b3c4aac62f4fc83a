"""Tokens from logits in NumPy: the filters of `Sampling`, and random numbers of each sequence's own."""

from __future__ import annotations

import math

import numpy as np

from mlx_lqr.backends.llama.framework import log_softmax
from mlx_lqr.backends.protocol import Float32, Sampling
from mlx_lqr.backends.sampling import LIKELIEST, GeneratorSampler


class NumPySampler(GeneratorSampler):
    """Draws with a generator for each sequence."""

    def _generator(self, seed: int) -> np.random.Generator:
        return np.random.default_rng(seed)

    def _likeliest(self, logits: np.ndarray) -> np.ndarray:
        return logits.argmax(axis=-1)

    def _filtered(self, logits: np.ndarray) -> Float32:
        logprobs = filtered(log_softmax(logits), self.sampling)
        return logprobs - logprobs.max(axis=-1, keepdims=True)

    def _drawn(self, logprobs: np.ndarray) -> np.ndarray:
        return np.array([_pick(row, one) for row, one in zip(logprobs, self._of(len(logprobs)), strict=True)])


def _pick(logprobs: np.ndarray, generator: np.random.Generator) -> int:
    """An index, by log-probabilities (V,) up to a constant."""
    possible = np.flatnonzero(logprobs > -np.inf)
    mass = np.cumsum(np.exp(logprobs[possible], dtype=np.float64))
    drawn = np.searchsorted(mass, generator.random() * mass[-1], side="right") if len(mass) else 0
    return int(possible[min(drawn, len(possible) - 1)]) if len(mass) else 0


def filtered(logprobs: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Log-probabilities (B, V) with those that the filters exclude at minus infinity, one filter after another."""
    if sampling.top_p < 1:
        logprobs = np.stack([_nucleus(row, sampling.top_p) for row in logprobs])
    if sampling.min_p > 0:
        least = logprobs.max(axis=-1, keepdims=True) + math.log(sampling.min_p)
        logprobs = np.where(logprobs < least, -np.inf, logprobs)
    if 0 < sampling.top_k < logprobs.shape[-1]:
        outside = np.argpartition(-logprobs, sampling.top_k - 1, axis=-1)[:, sampling.top_k :]
        logprobs = logprobs.copy()
        np.put_along_axis(logprobs, outside, -np.inf, axis=-1)
    return logprobs


def _nucleus(logprobs: np.ndarray, top_p: float) -> np.ndarray:
    """(V,) with minus infinity for all but the likeliest tokens that have `top_p` of the mass.

    To sort a whole vocabulary would take as long as a small model does, so the likeliest are tried first.
    """
    size = len(logprobs)
    for count in (min(LIKELIEST, size), size):
        chosen = np.argpartition(-logprobs, count - 1)[:count] if count < size else np.arange(size)
        chosen = chosen[np.argsort(-logprobs[chosen], kind="stable")]
        mass = np.cumsum(np.exp(logprobs[chosen], dtype=np.float64))
        if mass[-1] >= top_p:
            break
    inside = chosen[: int(np.searchsorted(mass, top_p)) + 1]
    kept = np.full_like(logprobs, -np.inf)
    kept[inside] = logprobs[inside]
    return kept
