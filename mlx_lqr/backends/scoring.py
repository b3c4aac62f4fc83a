"""How a model scores text, whatever the backend: many sequences in few passes, or in steps where a law has to see them.

A backend adds one pass (`ScoringModel._logits_at`) and its decoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np

from mlx_lqr.backends.batching import Stretches
from mlx_lqr.backends.framework import Framework
from mlx_lqr.backends.protocol import GREEDY, OVERFLOWED, Array, CarryingLaw, Continued, Float32, Kept, Law, Sampling


class ScoringModel(ABC):
    """`logits`, `log_probabilities` and `logits_along` of a `Recorder`."""

    vocab_size: int
    _framework: Framework
    _side_by_side: int | None = None
    """How many sequences a pass takes, at most"""

    @abstractmethod
    def decoder(self, law: Law | None = None, sampling: Sampling = GREEDY, *, rolling: bool = False) -> Any:
        """See `Runner`."""

    @abstractmethod
    def _computing(self, what: str) -> AbstractContextManager[None]:
        """Around all that is computed (see `Framework.computing`)."""

    @abstractmethod
    def _logits_at(self, asked: Stretches, law: Law | None, steer_all: bool, kept: Kept | None) -> tuple[Array, Array]:
        """The logits (n, V) in float32 at the n positions that are asked for, and 0 (n,), or NaN at those that
        overflow.

        Args:
            law: placed.
            kept: see `Recorder.logits_along`.
        """

    def place(self, law: Law | None) -> Any:
        """The law with its arrays on the model's device, in the dtype of the residual stream."""
        return self._framework.place(law)

    def logits(self, tokens: Sequence[int], *, law: Law | None = None, steer_all: bool = False) -> Float32:
        """See `Recorder`."""
        decoder = self.decoder(law)
        decoder.fill([tokens[:-1]], steered=steer_all)
        logits = decoder.step(tokens[-1:])
        if OVERFLOWED in decoder.sample(logits).tolist():
            raise self.decoder(law).overflow(tokens, 0 if steer_all else len(tokens) - 1)
        return self._framework.numpy(logits[0])

    def log_probabilities(
        self,
        pairs: Sequence[Continued],
        *,
        law: Law | None = None,
        steer_all: bool = False,
        kept: Kept | None = None,
    ) -> list[Float32]:
        """See `Recorder`."""
        scores = [np.empty(0, np.float32)] * len(pairs)
        with self._computing("the log-probabilities"):
            for i, logits in self._along([(prompt, tokens[:-1]) for prompt, tokens in pairs], law, steer_all, kept):
                scores[i] = self._framework.log_probabilities(logits, pairs[i][1])
        return scores

    def logits_along(
        self,
        pairs: Sequence[Continued],
        *,
        law: Law | None = None,
        steer_all: bool = False,
        kept: Kept | None = None,
    ) -> list[Float32]:
        """See `Recorder`."""
        with self._computing("the logits"):
            by_pair = {i: self._framework.numpy(logits) for i, logits in self._along(pairs, law, steer_all, kept)}
        return [by_pair[i] for i in range(len(pairs))]

    def _along(
        self, pairs: Sequence[Continued], law: Law | None, steer_all: bool, kept: Kept | None = None
    ) -> Iterator[tuple[int, Array]]:
        """The number of each pair, and its logits (1 + n, V) in float32."""
        framework, placed = self._framework, self.place(law)
        decoder = partial(self.decoder, law)
        for batch, asked in Stretches.batches(self.vocab_size, pairs, most=self._side_by_side):
            if isinstance(law, CarryingLaw) and law.acts:
                steps = framework.float32(framework.stack(list(asked.steps(decoder)), 1))
                yield from (
                    (i, steps[row, :count]) for row, (i, count) in enumerate(zip(batch, asked.counts, strict=True))
                )
                continue
            logits, spoiled = self._logits_at(asked, placed, steer_all, kept)
            asked.check((spoiled == 0).tolist(), decoder, steer_all=steer_all)
            start = 0
            for i, count in zip(batch, asked.counts, strict=True):
                yield i, logits[start : start + count]
                start += count
