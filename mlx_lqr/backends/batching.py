"""Many prompts in few passes: batches of similar length, padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_lqr.backends.protocol import OVERFLOWED, Array, Continued, Decoder, Float32, Progress

BATCH_TOKENS = 512
"""Tokens, padding included, per forward pass over many prompts."""
BATCH_LOGITS = 1 << 26
"""Numbers of logits at once, 256 MB of them: a large vocabulary makes smaller batches."""


def padded(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The prompts at one length.

    They are padded on the right, where causal attention keeps the padding away from every real token and each real
    token keeps its position.
    """
    width = max(len(prompt) for prompt in prompts)
    return [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]


def padded_left(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The prompts at one length for decoding side by side, each padded on the left with its own first token, or if it
    has none, that of the longest.

    A token that is in none of them could overflow where they do not: masked, it still spoils the sum.
    """
    longest = max(prompts, key=len)
    padding = [[*(prompt or longest)[:1]] * (len(longest) - len(prompt)) for prompt in prompts]
    return [[*pad, *prompt] for pad, prompt in zip(padding, prompts, strict=True)]


LEAST_SHARED = 8
"""Tokens that sequences begin with in common, for which it pays to read them once."""
PASS = 64
"""How many more tokens may be read for a pass less."""
KEPT = 4
"""How many tokens that are only kept for each sequence may stand for one that is read."""


def common_beginning(sequences: Sequence[Sequence[int]], most: int) -> int:
    """How many tokens, `most` at most, all sequences begin with; 0 where it would not pay to read them once."""
    ordered = sorted(tuple(sequence) for sequence in sequences)
    count = min(alike(ordered[0], ordered[-1]), most)  # what lies between them begins as both do
    return count if count >= LEAST_SHARED and len(sequences) > 1 else 0


def distinct_beginnings(sequences: Sequence[Sequence[int]], count: int) -> list[tuple[int, ...]]:
    """The first `count` tokens of sequences, each beginning once, in their order."""
    return list(dict.fromkeys(tuple(own[:count]) for own in sequences))


def alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@dataclass(frozen=True)
class Reading:
    """Prompts that one pass reads: each is a sequence of it, or the beginning of one."""

    sequences: list[Sequence[int]]
    rows: list[int]
    """The sequence of each prompt"""
    last: list[int]
    """The position of each prompt's last token"""
    shared: int
    """How many tokens of each sequence are read before the others, once for all that begin with them; no prompt ends in
    them"""
    beginnings: list[tuple[int, ...]]
    """These tokens, of the sequences of this pass at least: passes that have the same ones go on from one reading"""

    @property
    def prompts(self) -> list[Sequence[int]]:
        return [self.sequences[row][: last + 1] for row, last in zip(self.rows, self.last, strict=True)]


def in_batches(
    prompts: Sequence[Sequence[int]],
    of_batch: Callable[[Reading], Float32],
    progress: Progress | None,
    *,
    nested: bool = False,
    shares: bool = False,
) -> Float32:
    """Activations (n, ...) of n prompts from those of batches of sequences of similar length.

    Args:
        nested: a prompt that another begins with is read in the other's pass.
        shares: what sequences of a pass begin with in common is read once.
    """
    hosts = _hosts(prompts) if nested else {i: [i] for i in range(len(prompts))}
    result = np.empty(0, np.float32)
    done = 0
    for shared, numbers in _by_beginning(prompts, hosts) if shares else [(0, list(hosts))]:
        of_all = distinct_beginnings([prompts[i] for i in numbers], shared)
        at_once = len(of_all) * shared <= KEPT * BATCH_TOKENS
        for batch in batches([max(len(prompts[i]) - shared, len(prompts[i]) // KEPT) for i in numbers]):
            asked = [(row, i) for row, host in enumerate(batch) for i in hosts[numbers[host]]]
            sequences = [prompts[numbers[host]] for host in batch]
            activations = of_batch(
                Reading(
                    sequences,
                    [row for row, _ in asked],
                    [len(prompts[i]) - 1 for _, i in asked],
                    shared,
                    of_all if at_once else distinct_beginnings(sequences, shared),
                )
            )
            if not done:
                result = np.empty((len(prompts), *activations.shape[1:]), np.float32)
            result[[i for _, i in asked]] = activations
            done += len(asked)
            if progress:
                progress("Activations", done, len(prompts))
    return result


def _by_beginning(prompts: Sequence[Sequence[int]], hosts: Mapping[int, list[int]]) -> list[tuple[int, list[int]]]:
    """Sequences, by number, in groups that have beginnings of one length in common with others, and that length.

    Prompts in a chat template begin alike up to the question, and those with one question up to the answer.
    """
    least = {i: min(len(prompts[j]) for j in held) - 1 for i, held in hosts.items()}
    shared = common_beginning([prompts[i] for i in hosts], min(least.values()))
    ordered = sorted(hosts, key=lambda i: tuple(prompts[i]))
    clusters: list[list[int]] = []
    for i in ordered:
        if clusters and alike(prompts[clusters[-1][-1]], prompts[i]) >= shared + LEAST_SHARED:
            clusters[-1].append(i)
        else:
            clusters.append([i])
    groups: dict[int, list[int]] = {}
    for cluster in clusters:
        own = common_beginning([prompts[i] for i in cluster], min(least[i] for i in cluster))
        groups.setdefault(max(own, shared), []).extend(cluster)
    merged: list[tuple[int, list[int]]] = []
    for count, members in sorted(groups.items()):
        if merged and merged[-1][0] and (count - merged[-1][0]) * len(members) <= PASS:
            merged[-1][1].extend(members)
        else:
            merged.append((count, members))
    return merged


def _hosts(prompts: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """The prompts that no other begins with, by number, each with those that it begins with and itself."""
    hosts: dict[int, list[int]] = {}
    host: int | None = None
    for i in sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]), reverse=True):
        own = prompts[i]
        if host is None or list(prompts[host][: len(own)]) != list(own):
            host = i
        hosts.setdefault(host, []).append(i)
    return hosts


@dataclass(frozen=True)
class Stretches:
    """What `Recorder.logits_along` is asked for of some pairs, side by side: where it begins, and every position."""

    pairs: Sequence[Continued]

    @classmethod
    def batches(
        cls, vocabulary: int, pairs: Sequence[Continued], *, most: int | None = None
    ) -> Iterator[tuple[list[int], Stretches]]:
        """The numbers of the pairs of each batch, and the batch; at most so many pairs in one."""
        lengths = [len(prompt) + len(continuation) for prompt, continuation in pairs]
        for batch in batches(lengths, min(BATCH_TOKENS, BATCH_LOGITS // vocabulary), most=most):
            yield batch, cls([pairs[i] for i in batch])

    @property
    def sequences(self) -> list[list[int]]:
        return [[*prompt, *continuation] for prompt, continuation in self.pairs]

    @property
    def first(self) -> list[int]:
        """The position of each prompt's last token."""
        return [len(prompt) - 1 for prompt, _ in self.pairs]

    @property
    def shared(self) -> int:
        """How many tokens all sequences begin with, before any position that is asked for."""
        return common_beginning(self.sequences, min(self.first))

    @property
    def beginnings(self) -> list[tuple[int, ...]]:
        """See `Reading`; all sequences have one."""
        return [tuple(self.sequences[0][: self.shared])]

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


def batches(
    lengths: Sequence[int], limit: int = BATCH_TOKENS, *, most: int | None = None, pads: bool = True
) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, each of `limit` tokens at most, padding included, and of
    `most` sequences.

    Args:
        pads: sequences of a batch are read at one length. Where it takes more than `PASS` tokens of padding to bring
            some longer ones together with as many as would go with them, they are a batch of their own.
    """
    ordered = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while ordered:
        longest = lengths[ordered[0]]
        count = min(max(1, limit // max(1, longest)), len(lengths) if most is None else most, len(ordered))
        padding = [(count - i) * (longest - lengths[ordered[i]]) for i in range(count)]
        if pads and max(padding) > PASS:
            count = padding.index(max(padding))
        yield ordered[:count]
        ordered = ordered[count:]
