"""Tokens from logits, whatever the framework: the way from logits to a draw, and the penalties.

A backend adds the filters of `Sampling` in its own operations, and random numbers of each sequence's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mlx_lqr.backends.framework import Framework
from mlx_lqr.backends.hooks import Where
from mlx_lqr.backends.protocol import LEAST_TEMPERATURE, OVERFLOWED, RECENT, Array, Sampling, fresh_seed

LIKELIEST = 2048
"""Tokens that nearly always have the mass that top-p asks for."""


class Sampler(ABC):
    """Draws a token for each of B sequences with the same settings, as it would be drawn for that sequence alone."""

    def __init__(self, framework: Framework, sampling: Sampling) -> None:
        self.sampling = sampling
        self._framework = framework
        self._seed = sampling.seed if sampling.seed is not None else fresh_seed()
        self._recent: Array | None = None
        """(B, RECENT): the last tokens that were drawn, and `OVERFLOWED` where there are none, for the frequency and
        presence penalties; None where they are off, and until a token is drawn."""

    @property
    def state(self) -> Sequence[Array]:
        """The arrays that go from one draw to the next."""
        return [*self._streams(), *([] if self._recent is None else [self._recent])]

    def draw(self, logits: Array, seen: Array | None) -> Array:
        """A token (B,) from each row of logits (B, V).

        Args:
            seen: (B, V), the tokens met so far; None where nothing asks for them.
        """
        sampling = self.sampling
        if seen is not None and sampling.repetition_penalty != 1:
            logits = penalised(logits, seen, sampling.repetition_penalty, self._framework.where)
        if not self._looks_back:
            return self._pick(logits)
        recent = self._of_recent(len(logits))
        tokens = self._pick(self._less_likely(logits, recent))
        self._recent = self._framework.concatenate([recent[:, 1:], tokens[:, None]], 1)
        return tokens

    def join(self, other: Sampler, rows: int, others: int) -> None:
        """Go on with the `others` sequences of a sampler with the same settings behind these `rows`."""
        if self.sampling.temperature != 0:
            self._join_streams(other, rows, others)
        if self._looks_back:
            self._recent = self._framework.concatenate([self._of_recent(rows), other._of_recent(others)], 0)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences alone."""
        self._keep_streams(rows)
        if self._recent is not None:
            self._recent = self._recent[self._framework.integers(list(rows))]

    @property
    def _looks_back(self) -> bool:
        return self.sampling.frequency != 0 or self.sampling.presence_penalty != 0

    def _of_recent(self, rows: int) -> Array:
        """The last tokens of so many sequences: (rows, RECENT)."""
        return self._framework.integers([[OVERFLOWED] * RECENT] * rows) if self._recent is None else self._recent

    def _less_likely(self, logits: Array, recent: Array) -> Array:
        """The logits (B, V) with the frequency and presence penalties of the tokens that are `recent` (B, RECENT)."""
        drawn = recent != OVERFLOWED
        penalty = drawn * self.sampling.frequency
        if self.sampling.presence_penalty != 0:
            times = (recent[:, :, None] == recent[:, None, :]).sum(-1)  # how often each of them is there
            penalty = penalty + drawn * self.sampling.presence_penalty / times
        columns = self._framework.where(drawn, recent, 0)  # whose penalty is 0 where there is none
        return self._framework.added(self._framework.float32(logits), columns, -penalty)

    def _pick(self, logits: Array) -> Array:
        if self.sampling.temperature == 0:
            return self._likeliest(logits)
        relative = self._filtered(logits)
        return self._drawn(relative / max(self.sampling.temperature, LEAST_TEMPERATURE))

    @abstractmethod
    def _streams(self) -> Sequence[Array]:
        """The arrays that random numbers come from."""

    @abstractmethod
    def _join_streams(self, other: Sampler, rows: int, others: int) -> None:
        """Append the random streams of another sampler of this class; see `join`."""

    @abstractmethod
    def _keep_streams(self, rows: Sequence[int]) -> None:
        """Go on with the random streams of these sequences alone."""

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


class GeneratorSampler(Sampler):
    """Draws with a random generator of each sequence's own, kept outside the framework's arrays."""

    def __init__(self, framework: Framework, sampling: Sampling) -> None:
        super().__init__(framework, sampling)
        self._generators: list[Any] = []
        """One a row, made when the number of sequences is known."""

    @abstractmethod
    def _generator(self, seed: int) -> Any:
        """A new generator."""

    def _streams(self) -> Sequence[Array]:
        return ()

    def _join_streams(self, other: Any, rows: int, others: int) -> None:
        self._generators = [*self._of(rows), *other._of(others)]

    def _keep_streams(self, rows: Sequence[int]) -> None:
        if self._generators:
            self._generators = [self._generators[row] for row in rows]

    def _of(self, rows: int) -> list[Any]:
        """The generators of so many sequences."""
        if not self._generators:
            self._generators = [self._generator(self._seed + row) for row in range(rows)]
        return self._generators


class RowSamplers:
    """Draws for sequences side by side, each with its own settings; those with the same are drawn together.

    Args:
        sampler: of all sequences, until others join.
    """

    def __init__(self, framework: Framework, sampler: Sampler) -> None:
        self._framework = framework
        self._groups: list[tuple[Sampler, list[int]]] = [(sampler, [])]
        """Samplers of different settings, each with the numbers of its rows; a single one has all rows, unnumbered."""

    @property
    def sampling(self) -> Sampling:
        """The settings, of the first sequence where they differ."""
        return self._groups[0][0].sampling

    @property
    def state(self) -> Sequence[Array]:
        """The arrays that go from one draw to the next."""
        return [array for sampler, _ in self._groups for array in sampler.state]

    def draw(self, logits: Array, seen: Array | None) -> Array:
        """See `Sampler.draw`."""
        if len(self._groups) == 1:
            return self._groups[0][0].draw(logits, seen)
        drawn, order = [], []
        for sampler, rows in self._groups:
            chosen = self._framework.integers(rows)
            drawn.append(sampler.draw(logits[chosen], None if seen is None else seen[chosen]))
            order += rows
        places = sorted(range(len(order)), key=order.__getitem__)
        return self._framework.concatenate(drawn, 0)[self._framework.integers(places)]

    def join(self, other: RowSamplers, rows: int, others: int) -> None:
        """Go on with the `others` sequences of another one behind these `rows`."""
        groups = self._numbered(rows)
        for sampler, theirs in other._numbered(others):
            numbers = [rows + row for row in theirs]
            for mine, own in groups:
                if replace(mine.sampling, seed=None) == replace(sampler.sampling, seed=None):
                    mine.join(sampler, len(own), len(numbers))
                    own += numbers
                    break
            else:
                groups.append((sampler, numbers))
        self._set(groups)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences alone."""
        if len(self._groups) == 1:
            self._groups[0][0].keep(rows)
            return
        kept = []
        for sampler, own in self._groups:
            numbers = [new for new, row in enumerate(rows) if row in own]
            if numbers:
                sampler.keep([own.index(rows[new]) for new in numbers])
                kept.append((sampler, numbers))
        self._set(kept)

    def _set(self, groups: list[tuple[Sampler, list[int]]]) -> None:
        self._groups = groups if len(groups) > 1 else [(groups[0][0], [])]  # whose rows are in order

    def _numbered(self, rows: int) -> list[tuple[Sampler, list[int]]]:
        return [(sampler, list(own) or list(range(rows))) for sampler, own in self._groups]


def penalised(logits: Array, seen: Array, penalty: float, where: Where) -> Array:
    """The logits (B, V) with those of the tokens `seen` (B, V) made less likely (Sampling.repetition_penalty)."""
    return where(seen, where(logits > 0, logits / penalty, logits * penalty), logits)
