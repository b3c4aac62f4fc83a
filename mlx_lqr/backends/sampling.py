"""Tokens from logits, whatever the framework: the way from logits to a draw, and the repetition penalty.

A backend adds the filters of `Sampling` in its own operations, and random numbers of each sequence's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from mlx_lqr.backends.hooks import Where
from mlx_lqr.backends.protocol import LEAST_TEMPERATURE, Array, Sampling, fresh_seed


class Sampler(ABC):
    """Draws a token for each of B sequences, as it would be drawn for that sequence alone."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._seed = sampling.seed if sampling.seed is not None else fresh_seed()

    @property
    def state(self) -> Sequence[Array]:
        """The arrays that go from one draw to the next."""
        return ()

    def draw(self, logits: Array) -> Array:
        """A token (B,) from each row of logits (B, V)."""
        if self.sampling.temperature == 0:
            return self._likeliest(logits)
        relative = self._filtered(logits)
        return self._drawn(relative / max(self.sampling.temperature, LEAST_TEMPERATURE))

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences alone."""

    @abstractmethod
    def _likeliest(self, logits: Array) -> Array:
        """(B,)"""

    @abstractmethod
    def _filtered(self, logits: Array) -> Array:
        """Log-probabilities (B, V) less the largest, with those that the filters exclude at minus infinity.

        In float32. At low temperatures, only the 0 of the likeliest stays finite.
        """

    @abstractmethod
    def _drawn(self, logprobs: Array) -> Array:
        """A token (B,) from each row of log-probabilities (B, V), up to a constant."""


def penalised(logits: Array, seen: Array, penalty: float, where: Where) -> Array:
    """The logits (B, V) with those of the tokens `seen` (B, V) made less likely (Sampling.repetition_penalty)."""
    return where(seen, where(logits > 0, logits / penalty, logits * penalty), logits)
