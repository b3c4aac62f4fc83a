"""Decoding with a model whose own modules run: the bookkeeping of some sequences side by side, whatever the framework.

A backend adds its caches, how a token is run through the model, and the trace of one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

from mlx_lqr.backends.batching import padded_left
from mlx_lqr.backends.framework import Framework
from mlx_lqr.backends.hooks import BlockCall, BlockHooks, LawHooks
from mlx_lqr.backends.overflow import Examined, located
from mlx_lqr.backends.protocol import OVERFLOWED, Array, CarryingLaw, Float32, Law, Sampling, Scored, restart
from mlx_lqr.backends.row_laws import RowLaws
from mlx_lqr.backends.sampling import RowSamplers, Sampler
from mlx_lqr.errors import InputError, OverflowingError

PREFILL_CHUNK = 512
"""Prompt tokens, of all sequences together, per forward pass while the cache is filled."""
Head = Literal["none", "last", "all"]
"""At which positions of a pass logits are asked for"""
SINKS = 4
"""How many of the oldest tokens a rolling cache keeps: attention leans on them (arXiv 2309.17453)."""


class HookedDecoder(ABC):
    """Everything of `TracingDecoder` that frameworks have in common.

    Args:
        blocks: the model's.
        vocabulary: its size.
        law, sampling: see the protocol.
        window: how many tokens a rolling context holds; None where it does not roll.
    """

    def __init__(
        self,
        framework: Framework,
        blocks: Sequence[Any],
        vocabulary: int,
        law: Law | None,
        sampling: Sampling,
        window: int | None,
    ) -> None:
        self._framework = framework
        self._blocks = blocks
        self._vocabulary = vocabulary
        self._window = window
        self._cache: Any = None
        self._lengths: list[int] = []
        """How many tokens the cache holds of each sequence."""
        self._hooks: BlockHooks | None = None
        self._energy: Array | None = None
        """|z|^2 (B,) after the last steered block of the last step: not finite once activations overflow."""
        self._energies: Array | None = None
        """The same at every position of the last steered pass that was not compiled: (B, L)"""
        self._seen: Array | None = None
        """(B, V): the tokens met so far, for the repetition penalty."""
        self.law = law
        self.sampling = sampling

    @property
    @abstractmethod
    def position(self) -> int:
        """How many tokens the cache holds, of the longest sequence."""

    @abstractmethod
    def _place(self, law: Law | None) -> Law | None:
        """The law with this framework's arrays; what was made for the one before it is forgotten."""

    @abstractmethod
    def _sampler_of(self, sampling: Sampling) -> Sampler: ...

    @abstractmethod
    def _new_cache(self, padding: list[int]) -> Any:
        """Caches for sequences with this much padding on their left."""

    @abstractmethod
    def _append(self, tokens: Array, *, steered: bool, head: Head = "last") -> Array:
        """Run tokens (B, L), all of them steered or none: the last one's logits (B, V), those of all (B, L, V), or
        anything."""

    @abstractmethod
    def _step(self, tokens: Array) -> Array:
        """Run one token (B,) of each sequence, steered, in the fastest way: logits (B, V)."""

    @abstractmethod
    def _keep(self, rows: Array) -> None:
        """Go on with these rows of the cache."""

    @abstractmethod
    def _join(self, other: Any) -> None:
        """Append what another decoder's cache holds; what is around it is as before."""

    @abstractmethod
    def _copy_of(self, row: int) -> Any:
        """A decoder of this kind with a copy of what the cache holds of one sequence."""

    @abstractmethod
    def _rewind(self, position: int) -> bool:
        """Let the cache forget what lies beyond; False where it cannot."""

    @abstractmethod
    def _trace(self, token: int) -> Any:
        """`trace`, inside `_computing`."""

    def _left_over(self) -> Iterable[Array]:
        """What the next step needs and the token does not wait for; the next step may be another thread's."""
        arrays = [self._seen, self._energy, *self._samplers.state]
        return [array for array in arrays if array is not None]

    def _go_on_alone(self) -> None:  # noqa: B027 - where that is no faster, nothing changes
        """A single sequence is left: decode it as one that has never been in a batch."""

    @abstractmethod
    def _settle(self) -> None:
        """Bring the cache into its usual form, where steps keep it in another."""

    @property
    def law(self) -> Law | None:
        return self._law

    @law.setter
    def law(self, law: Law | None) -> None:
        with self._framework.computing("the next token"):
            self._law: Law | None = self._place(law)
            self._hooks = self._hooks_of(self._law)

    def _computing(self, what: str) -> AbstractContextManager[None]:
        """See `Framework.running`."""
        return self._framework.running(self._blocks, what)

    def _hooks_of(self, placed: Law | None) -> BlockHooks | None:
        """What steers with a placed law, and leaves in `_energy` what came of it."""
        if placed is None or not placed.layers:
            return None
        layers = self._hooked_layers(placed)
        steering = placed.hooks() if isinstance(placed, RowLaws) else LawHooks(placed)
        framework, last = self._framework, max(layers, default=None)

        def hook(k: int, z: Array, call: BlockCall) -> Array:
            output = steering.block(k, z, call)
            if k == last:
                self._energies = framework.energy(output)
                self._energy = self._energies[:, -1]
            return output

        return framework.hooks(self._blocks, hook, layers, steering)

    def _hooked_layers(self, law: Law) -> Sequence[int]:
        """Those of the law's layers whose blocks run in this process."""
        return law.layers

    @property
    def sampling(self) -> Sampling:
        return self._samplers.sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._samplers = RowSamplers(self._framework, self._sampler_of(sampling))

    def fill(self, prompts: Sequence[Sequence[int]], *, steered: bool) -> None:
        """See `Decoder`."""
        with self._computing("the prompts"):
            self._fill(prompts, steered=steered)
            self._lengths = [held + len(prompt) for held, prompt in zip(self._lengths, prompts, strict=True)]

    def _fill(self, prompts: Sequence[Sequence[int]], *, steered: bool) -> None:
        """`fill`, inside `_computing`."""
        self._settle()
        restart(self._law)
        width = max(len(prompt) for prompt in prompts)
        if not self._cache:
            self._start([width - len(prompt) for prompt in prompts])
        if self._seen is not None:
            for row, prompt in enumerate(prompts):
                self._seen[row, self._framework.integers(list(prompt))] = True
        tokens = self._framework.integers(padded_left(prompts))
        chunk = max(1, PREFILL_CHUNK // len(prompts))
        for start in range(0, width, chunk):
            self._append(tokens[:, start : start + chunk], steered=steered, head="none")

    def step(self, tokens: Array | Sequence[int]) -> Array:
        """See `Decoder`."""
        with self._computing("the next token"):
            if not self._cache:
                self._start([0] * len(tokens))
            tokens = self._framework.tokens(tokens)
            if self._seen is not None:
                self._seen[self._framework.arange(len(tokens)), tokens] = True
            self._lengths = [held + 1 for held in self._lengths]
            return self._step(tokens)

    def logits_along(self, tokens: Sequence[int], *, steered: bool) -> Float32:
        """See `Decoder`."""
        framework = self._framework
        with self._computing("the logits"):
            self._settle()
            if not self._cache:
                self._start([0])
            logits = framework.float32(self._append(framework.integers([list(tokens)]), steered=steered, head="all"))[0]
            self._lengths = [self._lengths[0] + len(tokens)]
            spoiled = (logits * 0).sum(-1)
            if steered and self._hooks is not None and self._energies is not None:
                spoiled = spoiled + self._energies[0] * 0
            return framework.numpy(logits + spoiled[:, None])

    def sample(self, logits: Array) -> Array:
        """See `Decoder`."""
        framework = self._framework
        with framework.computing("the next token"):
            spoiled = (logits * 0).sum(-1)  # 0, or NaN where one of them is not finite
            if self._energy is not None:
                spoiled = spoiled + self._energy * 0
            tokens = framework.where(spoiled == 0, self._samplers.draw(logits, self._seen), OVERFLOWED)
            framework.start([tokens, *self._left_over()])
        return tokens

    def log_probabilities(self, logits: Array, tokens: Array, top: int) -> list[Scored]:
        """See `Decoder`."""
        framework = self._framework
        with framework.computing("the next token"):
            logits = framework.float32(logits)
            drawn = framework.log_probabilities(logits, framework.tokens(tokens).tolist())
            numbers, values = framework.likeliest(logits, top)
            ranked = zip(numbers.tolist(), values.tolist(), strict=True)
            likeliest = [tuple(zip(*row, strict=True)) for row in ranked]
        return list(zip(drawn.tolist(), likeliest, strict=True))

    def keep(self, rows: Sequence[int], tokens: Array | Sequence[int]) -> Array:
        """See `Decoder`."""
        with self._framework.computing("the next token"):
            self._settle()
            chosen = self._framework.integers(list(rows))
            self._keep(chosen)
            self._lengths = [self._lengths[row] for row in rows]
            if isinstance(self._law, RowLaws):
                self._take(self._law.keep(rows))
            elif isinstance(self._law, CarryingLaw):
                self._law.keep(chosen)
            self._samplers.keep(rows)
            if self._seen is not None:
                self._seen = self._seen[chosen]
            if len(rows) == 1:
                self._go_on_alone()
            return self._framework.tokens(tokens)[chosen]

    def join(self, other: HookedDecoder, tokens: Array | Sequence[int], others: Array | Sequence[int]) -> Array:
        """See `Decoder`."""
        if self._window is not None or other._window is not None:
            raise InputError("a batch cannot roll its context: decode one prompt at a time")
        with self._framework.computing("the prompts"):
            self._settle()
            other._settle()
            self._join(other)
            rows, joining, vocabulary = len(self._lengths), len(other._lengths), self._vocabulary
            self._lengths += other._lengths
            self._take(RowLaws(self._framework, [*self._law_of_rows(rows), *other._law_of_rows(joining)]))
            self._samplers.join(other._samplers, rows, joining)
            if self._seen is not None or other._seen is not None:
                both = [
                    self._framework.none_seen(count, vocabulary) if seen is None else seen
                    for seen, count in ((self._seen, rows), (other._seen, joining))
                ]
                self._seen = self._framework.concatenate(both, 0)
            self._energy = other._cache = None
            return self._framework.concatenate([self._framework.tokens(part) for part in (tokens, others)], 0)

    def apart(self, row: int) -> Any:
        """See `Decoder`."""
        with self._framework.computing("the next token"):
            self._settle()
            alone = self._copy_of(row)
            alone._lengths = [self._lengths[row]]
            return alone

    @property
    def failures(self) -> Mapping[int, Exception]:
        """See `Decoder`."""
        return self._law.failures if isinstance(self._law, RowLaws) else {}

    @property
    def shares_passes(self) -> bool:
        """See `Decoder`."""
        return True

    @property
    def fills_in_parts(self) -> bool:
        """See `Decoder`."""
        return True

    def _take(self, laws: RowLaws) -> None:
        self._law, self._hooks = laws, self._hooks_of(laws)

    def _law_of_rows(self, rows: int) -> Sequence[Law | None]:
        """The law of each sequence."""
        if isinstance(self._law, RowLaws):
            return self._law.laws
        if rows > 1 and isinstance(self._law, CarryingLaw):
            raise InputError("a batch whose law carries something from token to token cannot be joined")
        return [self._law] * rows

    def rewind(self, position: int) -> bool:
        """See `Decoder`."""
        with self._framework.computing("the next token"):
            self._settle()
            if not self._cache or self._seen is not None or not self._rewind(position):
                return False
            self._lengths = [position]
            return True

    def trace(self, token: int) -> Any:
        """See `TracingDecoder`."""
        with self._computing("the trace"):
            return self._trace(token)

    def trace_prompt(self, prompt: Sequence[int], held: int = 0) -> Any:
        """`fill` of all but the last token, not steered, and `trace` of that one, for a decoder that holds the first
        `held` tokens of it and no more, or a new one."""
        with self._computing("the trace"):
            return self._trace_prompt(prompt, held)

    def _trace_prompt(self, prompt: Sequence[int], held: int) -> Any:
        if len(prompt) - 1 > held:
            self._fill([prompt[held:-1]], steered=False)
        return self._trace(prompt[-1])

    def overflow(self, tokens: Sequence[int], first: int) -> OverflowingError:
        """See `Decoder`."""
        with self._computing("the prompts"):
            self._start([0])
            restart(self._law)
            return located(
                self._examined,
                tokens,
                first,
                self._law,
                layers=len(self._blocks),
                chunk=PREFILL_CHUNK,
                dtype=self._framework.dtype_name,
            )

    def _examined(self, tokens: Sequence[int], steering: LawHooks) -> Examined:
        framework = self._framework
        energies: list[Array] = []

        def record(k: int, z: Array, call: BlockCall) -> Array:
            if k == 0:
                energies.append(framework.energy(z)[0])
            output = steering.block(k, z, call)
            energies.append(framework.energy(output)[0])
            framework.compute([output, *energies])  # or the intermediates of all blocks are held at once
            return output

        with framework.hooked(self._blocks, record, range(len(self._blocks)), steering):
            logits = self._append(framework.integers([list(tokens)]), steered=False)
        return [row.tolist() for row in energies], framework.is_finite(logits)

    def _start(self, padding: list[int]) -> None:
        if self._window is not None and len(padding) > 1:
            raise InputError("a batch cannot roll its context: decode one prompt at a time")
        self._cache, self._lengths = self._new_cache(padding), [0] * len(padding)
        if self.sampling.repetition_penalty != 1:
            self._seen = self._framework.none_seen(len(padding), self._vocabulary)
