"""Decoding with llama.cpp: some sequences side by side, each with its own law and sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from mlx_lqr.backends.llama.context import BATCH, Batch, Context, Slot
from mlx_lqr.backends.llama.framework import NumPyFramework
from mlx_lqr.backends.llama.hook import Rows
from mlx_lqr.backends.llama.sampling import NumPySampler
from mlx_lqr.backends.protocol import (
    GREEDY,
    OVERFLOWED,
    Array,
    CarryingLaw,
    Float32,
    Law,
    Sampling,
    Scored,
    restart,
)
from mlx_lqr.backends.sampling import RowSamplers
from mlx_lqr.errors import InputError, OverflowingError

SINKS = 4
"""How many of the oldest tokens a rolling context keeps: attention leans on them (arXiv 2309.17453)."""
Overflow = Callable[[Law | None, Sequence[int], int], OverflowingError]
"""(law, tokens, first) -> the error of a sequence that overflows, steered from position `first` on"""


@dataclass(frozen=True)
class _Waiting:
    """Tokens of a prompt that run together with the next step, in one pass of the model."""

    rows: Sequence[int]
    """The sequence of each"""
    tokens: Sequence[int]
    steered: bool


_NOTHING = _Waiting((), (), False)


class LlamaDecoder:
    """The `Decoder` protocol.

    Args:
        context: where the sequences are, among those of other decoders.
        vocabulary: its size.
        overflow: finds the layer.
        law, sampling: see the protocol.
        window: how many tokens a rolling context holds; None where it does not roll.
    """

    def __init__(
        self,
        context: Context,
        framework: NumPyFramework,
        vocabulary: int,
        overflow: Overflow,
        law: Law | None,
        sampling: Sampling,
        window: int | None = None,
    ) -> None:
        self._context, self._framework, self._vocabulary = context, framework, vocabulary
        self._located, self._window = overflow, window
        self._slots: list[Slot] = []
        self._waiting = _NOTHING
        self._own: list[Law | None] | None = None
        """The law of each sequence, where they differ"""
        self._failures: dict[int, Exception] = {}
        self._seen: np.ndarray | None = None
        """(B, V): the tokens met so far, for the repetition penalty."""
        self.law = law
        self.sampling = sampling

    @property
    def law(self) -> Law | None:
        """See `Decoder`; of the first sequence, where they differ."""
        return self._law if self._own is None else self._own[0]

    @law.setter
    def law(self, law: Law | None) -> None:
        with self._framework.computing("the next token"):
            self._run_waiting()
            self._own = None
            self._law = self._framework.place(law)
            if self._law is not None:
                self._context.expect_laws()

    @property
    def sampling(self) -> Sampling:
        return self._samplers.sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._samplers = RowSamplers(self._framework, NumPySampler(self._framework, sampling))

    @property
    def position(self) -> int:
        """See `Decoder`."""
        waiting = self._waiting.rows
        lengths = [slot.length - slot.forgotten + waiting.count(row) for row, slot in enumerate(self._slots)]
        return max(lengths, default=0)

    @property
    def failures(self) -> Mapping[int, Exception]:
        """See `Decoder`."""
        return self._failures

    @property
    def shares_passes(self) -> bool:
        """See `Decoder`."""
        return True

    @property
    def fills_in_parts(self) -> bool:
        """See `Decoder`."""
        return True

    def fill(self, prompts: Sequence[Sequence[int]], *, steered: bool) -> None:
        """See `Decoder`."""
        with self._framework.computing("the prompts"):
            self._run_waiting()
            for law in self._laws:
                restart(law)
            if not self._slots:
                self._start(len(prompts))
            if self._seen is not None:
                for row, prompt in enumerate(prompts):
                    self._seen[row, list(prompt)] = True
            rows = ((row, token) for row, prompt in enumerate(prompts) for token in prompt)
            carries = steered and any(isinstance(law, CarryingLaw) for law in self._laws)
            most = 1 if carries else BATCH if self._window is None else max(1, min(BATCH, self._window // 2))
            while part := list(islice(rows, most)):
                self._run_waiting()
                self._waiting = _Waiting([row for row, _ in part], [token for _, token in part], steered)
            if carries or self._window is not None:
                self._run_waiting()

    def step(self, tokens: Array | Sequence[int]) -> Float32:
        """See `Decoder`."""
        with self._framework.computing("the next token"):
            if not self._slots:
                self._start(len(tokens))
            tokens = self._framework.tokens(tokens)
            rows = range(len(tokens))
            if self._seen is not None:
                self._seen[rows, tokens] = True
            if len(self._waiting.rows) + len(tokens) > BATCH:
                self._run_waiting()
            waiting, self._waiting = self._waiting, _NOTHING
            return self._append(rows, tokens.tolist(), after=waiting)

    def logits_along(self, tokens: Sequence[int], *, steered: bool) -> Float32:
        """See `Decoder`."""
        with self._framework.computing("the logits"):
            self._run_waiting()
            if not self._slots:
                self._start(1)
            parts = [tokens[start : start + BATCH] for start in range(0, len(tokens), BATCH)]
            logits = np.concatenate([self._append([0] * len(part), part, steered=steered) for part in parts])
            return logits + (logits * 0).sum(axis=-1, keepdims=True)

    def sample(self, logits: Array) -> np.ndarray:
        """See `Decoder`."""
        with self._framework.computing("the next token"):
            finite = np.isfinite(logits).all(axis=-1)
            if finite.all():
                drawn: np.ndarray = self._samplers.draw(logits, self._seen)
                return drawn
            drawn = self._samplers.draw(np.where(finite[:, None], logits, 0), self._seen)
            return np.where(finite, drawn, OVERFLOWED)

    def log_probabilities(self, logits: Array, tokens: Array, top: int) -> list[Scored]:
        """See `Decoder`."""
        drawn = self._framework.log_probabilities(logits, self._framework.tokens(tokens).tolist())
        numbers, values = self._framework.likeliest(logits, top)
        ranked = zip(numbers.tolist(), values.tolist(), strict=True)
        likeliest = [tuple(zip(*row, strict=True)) for row in ranked]
        return list(zip(drawn.tolist(), likeliest, strict=True))

    def keep(self, rows: Sequence[int], tokens: Array | Sequence[int]) -> np.ndarray:
        """See `Decoder`."""
        with self._framework.computing("the next token"):
            self._run_waiting()
            chosen = self._framework.integers(list(rows))
            self._slots = [self._slots[row] for row in rows]
            if self._own is not None:
                self._own = [self._own[row] for row in rows]
            elif isinstance(self._law, CarryingLaw):
                self._law.keep(chosen)
            self._failures = {new: self._failures[row] for new, row in enumerate(rows) if row in self._failures}
            self._samplers.keep(rows)
            if self._seen is not None:
                self._seen = self._seen[chosen]
            kept: np.ndarray = self._framework.tokens(tokens)[chosen]
            return kept

    def join(self, other: LlamaDecoder, tokens: Array | Sequence[int], others: Array | Sequence[int]) -> np.ndarray:
        """See `Decoder`."""
        if self._window is not None or other._window is not None:
            raise InputError("a batch cannot roll its context: decode one prompt at a time")
        with self._framework.computing("the prompts"):
            self._run_waiting()
            other._run_waiting()
            rows, joining = len(self._slots), len(other._slots)
            self._own = [*self._law_of_rows(), *other._law_of_rows()]
            self._slots, other._slots = [*self._slots, *other._slots], []
            self._failures |= {rows + row: error for row, error in other._failures.items()}
            self._samplers.join(other._samplers, rows, joining)
            if self._seen is not None or other._seen is not None:
                both = [
                    self._framework.none_seen(count, self._vocabulary) if seen is None else seen
                    for seen, count in ((self._seen, rows), (other._seen, joining))
                ]
                self._seen = np.concatenate(both)
            return np.concatenate([self._framework.tokens(part) for part in (tokens, others)])

    def apart(self, row: int) -> LlamaDecoder:
        """See `Decoder`."""
        with self._framework.computing("the next token"):
            self._run_waiting()
            alone = LlamaDecoder(self._context, self._framework, self._vocabulary, self._located, None, GREEDY)
            alone._slots = [self._context.copy(self._slots[row])]
            return alone

    def rewind(self, position: int) -> bool:
        """See `Decoder`."""
        with self._framework.computing("the next token"):
            self._run_waiting()
            if not self._slots or self._seen is not None or self._slots[0].forgotten:
                return False
            return self._context.forget(self._slots[0], position)

    def overflow(self, tokens: Sequence[int], first: int) -> OverflowingError:
        """See `Decoder`."""
        return self._located(self._law, tokens, first)

    @property
    def _laws(self) -> Sequence[Law | None]:
        return [self._law] if self._own is None else self._own

    def _law_of_rows(self) -> list[Law | None]:
        """The law of each sequence."""
        if self._own is not None:
            return self._own
        if len(self._slots) > 1 and isinstance(self._law, CarryingLaw):
            raise InputError("a batch whose law carries something from token to token cannot be joined")
        return [self._law] * len(self._slots)

    def _start(self, count: int) -> None:
        if self._window is not None and count > 1:
            raise InputError("a batch cannot roll its context: decode one prompt at a time")
        self._slots = [self._context.slot() for _ in range(count)]
        if self.sampling.repetition_penalty != 1:
            self._seen = self._framework.none_seen(count, self._vocabulary)

    def _run_waiting(self) -> None:
        """Run what `fill` has left for the next step."""
        waiting, self._waiting = self._waiting, _NOTHING
        if waiting.rows:
            self._append((), (), after=waiting)

    def _append(
        self, rows: Sequence[int], tokens: Sequence[int], *, after: _Waiting = _NOTHING, steered: bool = True
    ) -> Float32:
        """Run tokens of these sequences after what is waiting: the logits (n, V) of each.

        Args:
            after: nothing, where the tokens are not steered.
        """
        rows_of_all, start = [*after.rows, *rows], len(after.rows)
        if self._window is not None:
            self._make_room(len(rows_of_all))
        first = 0 if after.steered else start
        steering, owners = self._steering(rows_of_all, first if steered else len(rows_of_all))
        batch = Batch(
            [*after.tokens, *tokens],
            [self._slots[row] for row in rows_of_all],
            range(start, len(rows_of_all)),
            steering,
        )
        logits, failures = self._context.run(batch)
        if failures and self._own is None:
            raise next(iter(failures.values()))
        for number, error in failures.items():
            self._failures[owners[number]] = error
        return logits

    def _steering(self, rows: Sequence[int], first: int) -> tuple[list[Rows], list[int]]:
        """What steers these rows of a batch from the `first` on, and for laws of their own the sequence of each."""
        steered = range(first, len(rows))
        if self._own is None:
            return ([] if self._law is None or not steered else [Rows(self._law, steered)]), []
        steering, owners = [], []
        for sequence, law in enumerate(self._own):
            own = [i for i in steered if rows[i] == sequence]
            if law is not None and own and sequence not in self._failures:
                steering.append(Rows(law, own))
                owners.append(sequence)
        return steering, owners

    def _make_room(self, count: int) -> None:
        """Forget the oldest tokens but a few, so that as many more fit the window."""
        assert self._window is not None
        for slot in self._slots:
            excess = slot.length - slot.forgotten + count - self._window
            if excess > 0:
                start = SINKS + slot.forgotten
                self._context.forget(slot, start, min(start + excess, slot.length))
