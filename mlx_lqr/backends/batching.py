"""Many prompts in few passes: batches of similar length, padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_lqr.backends.protocol import OVERFLOWED, Array, Continued, Decoder, Float32, Progress

BATCH_TOKENS = 512
"""Tokens, padding included, per forward pass over many prompts."""
BATCH_LOGITS = 1 << 26
"""Numbers of logits at once, 256 MB of them: a large vocabulary makes smaller batches."""


def padded(prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
    """The prompts at one length, and where the last token of each is.

    They are padded on the right, where causal attention keeps the padding away from every real token and each real
    token keeps its position.
    """
    width = max(len(prompt) for prompt in prompts)
    return [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], [len(prompt) - 1 for prompt in prompts]


def padded_left(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The prompts at one length for decoding side by side, each padded on the left with its own first token, or if it
    has none, that of the longest.

    A token that is in none of them could overflow where they do not: masked, it still spoils the sum.
    """
    longest = max(prompts, key=len)
    padding = [[*(prompt or longest)[:1]] * (len(longest) - len(prompt)) for prompt in prompts]
    return [[*pad, *prompt] for pad, prompt in zip(padding, prompts, strict=True)]


def in_batches(
    prompts: Sequence[Sequence[int]],
    of_batch: Callable[[list[Sequence[int]]], Float32],
    progress: Progress | None,
) -> Float32:
    """Activations (n, ...) of n prompts from those of batches of prompts of similar length."""
    result = np.empty(0, np.float32)
    done = 0
    for batch in batches([len(prompt) for prompt in prompts]):
        activations = of_batch([prompts[i] for i in batch])
        if not done:
            result = np.empty((len(prompts), *activations.shape[1:]), np.float32)
        result[batch] = activations
        done += len(batch)
        if progress:
            progress("Activations", done, len(prompts))
    return result


@dataclass(frozen=True)
class Stretches:
    """What `Recorder.logits_along` is asked for of some pairs, side by side: where it begins, and every position."""

    pairs: Sequence[Continued]

    @classmethod
    def batches(cls, vocabulary: int, pairs: Sequence[Continued]) -> Iterator[tuple[list[int], Stretches]]:
        """The numbers of the pairs of each batch, and the batch."""
        lengths = [len(prompt) + len(continuation) for prompt, continuation in pairs]
        for batch in batches(lengths, min(BATCH_TOKENS, BATCH_LOGITS // vocabulary)):
            yield batch, cls([pairs[i] for i in batch])

    @property
    def sequences(self) -> list[list[int]]:
        return [[*prompt, *continuation] for prompt, continuation in self.pairs]

    @property
    def first(self) -> list[int]:
        """The position of each prompt's last token."""
        return [len(prompt) - 1 for prompt, _ in self.pairs]

    @property
    def counts(self) -> list[int]:
        return [1 + len(continuation) for _, continuation in self.pairs]

    def steps(self, decoder: Callable[[], Decoder]) -> Iterator[Array]:
        """The logits (B, V) of one position of all pairs after the other, for laws that carry something from one to the
        next. What comes beyond a pair's end says nothing.

        Args:
            decoder: makes new ones, with the law.

        Raises:
            OverflowingError: after the last of them.
        """
        running = decoder()
        running.fill([prompt[:-1] for prompt, _ in self.pairs], steered=False)
        tokens = [(prompt[-1], *continuation) for prompt, continuation in self.pairs]
        drawn: list[Array] = []
        for step in range(max(self.counts)):
            logits = running.step([own[min(step, len(own) - 1)] for own in tokens])
            drawn.append(running.sample(logits))
            yield logits
        values = [step.tolist() for step in drawn]
        for row, count in enumerate(self.counts):
            if any(values[step][row] == OVERFLOWED for step in range(count)):
                raise decoder().overflow(self.sequences[row], self.first[row])

    def check(self, finite: Sequence[bool], decoder: Callable[[], Decoder], *, steer_all: bool) -> None:
        """Raise `OverflowingError` where a position, in the order of `positions`, is not finite; see `steps`."""
        if not all(finite):
            row = self.rows[list(finite).index(False)]
            raise decoder().overflow(self.sequences[row], 0 if steer_all else self.first[row])

    @property
    def rows(self) -> list[int]:
        return [row for row, count in enumerate(self.counts) for _ in range(count)]

    @property
    def positions(self) -> list[int]:
        return [start + i for start, count in zip(self.first, self.counts, strict=True) for i in range(count)]


def batches(lengths: Sequence[int], limit: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, each of `limit` tokens at most, padding included."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > limit:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
