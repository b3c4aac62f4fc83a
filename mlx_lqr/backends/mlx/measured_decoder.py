"""Decoding with a model whose caches may be of any kind, a trace of it that knows none of them.

Sequences of a batch read their prompts each alone, so that no padding comes into a state-space cache. Their caches are
then merged, by mlx-lm's own code, where that was measured to agree; else each sequence is run alone at every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lqr.backends.hooked_decoder import PREFILL_CHUNK, SINKS, Head, HookedDecoder
from mlx_lqr.backends.hooks import BlockHooks, LawHooks
from mlx_lqr.backends.mlx.copying import arrays_in, copied
from mlx_lqr.backends.mlx.decoder import MLXDecoder
from mlx_lqr.backends.mlx.framework import MLXFramework
from mlx_lqr.backends.mlx.frozen import FrozenBlock, frozen_at
from mlx_lqr.backends.mlx.layout import Layout
from mlx_lqr.backends.mlx.library import can_rewind, can_roll, decoding_caches, merged_caches, new_caches
from mlx_lqr.backends.mlx.measurement import Measurement
from mlx_lqr.backends.mlx.step import CompiledStep, FixedCache
from mlx_lqr.backends.overflow import Examined
from mlx_lqr.backends.protocol import GREEDY, CarryingLaw, Float32, Law, Sampling, restart
from mlx_lqr.backends.row_laws import RowLaws
from mlx_lqr.errors import InputError

CLOSE = 1e-3
"""How far the logits of compiled steps may lie from those of plain ones, times the largest of these."""


@dataclass(frozen=True)
class FrozenTrace:
    """What the Jacobians at a prompt's last token depend on."""

    state: Float32
    """s_0..s_T: (T + 1, d + m)"""
    blocks: list[FrozenBlock]
    width: int
    """d"""

    @property
    def residual(self) -> Float32:
        """z_0..z_T: (T + 1, d)"""
        return self.state[:, : self.width]

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + sum(block.nbytes for block in self.blocks)


def check_site(law: Law | None, layout: Layout) -> None:
    """Refuse a law that acts on attention heads, which no process of several has all of."""
    if law is not None and law.site == "attention" and layout.spread is not None:
        raise InputError(ON_ONE_MACHINE)


ON_ONE_MACHINE = "attention heads are read and steered on one machine alone: use a method that acts on whole blocks"


class ConfirmedStep(CompiledStep):
    """A compiled step that is used once it has given what plain steps give.

    Nothing is known of what a model does with its caches: it may ask a position for its value, which while a step is
    recorded it has not, or attend in a way that `FixedCache` does not foresee.
    """

    confirmed: bool | None = None
    """None until it has been tried."""


class MeasuredDecoder(MLXDecoder):
    """The `TracingDecoder` protocol.

    Args:
        compiled: see `MLXDecoder`.
    """

    def __init__(
        self,
        module: nn.Module,
        framework: MLXFramework,
        layout: Layout,
        measurement: Measurement,
        law: Law | None,
        sampling: Sampling,
        window: int | None = None,
        compiled: ConfirmedStep | None = None,
    ) -> None:
        self._layout, self._measurement = layout, measurement
        self._tried = compiled
        self._apart = False
        """Whether `_cache` holds the caches of each sequence on its own."""
        self._hooks_of_rows: list[BlockHooks | None] = []
        """What steers each of these sequences; empty until it is asked for."""
        self._is_examined = False
        super().__init__(module, framework, layout.blocks, layout.vocabulary, law, sampling, window, compiled)

    def _step(self, tokens: mx.array) -> mx.array:
        step = self._tried
        try:
            logits = super()._step(tokens)
        except Exception:  # recorded anew for longer buffers, the step may come to what it cannot do
            if step is None or not step.confirmed:
                raise
            step.confirmed = False
            logits = super()._step(tokens)
        return self._layout.finite(logits)

    def _can_replay(self, tokens: mx.array) -> bool:
        step = self._tried
        if step is None or not super()._can_replay(tokens):
            return False
        if step.confirmed is None:
            step.confirmed = self._gives_the_same(step, tokens)
        return step.confirmed

    def _gives_the_same(self, step: ConfirmedStep, tokens: mx.array) -> bool:
        """Whether this token, taken twice, has the same logits by compiled and by plain steps."""
        caches = copied(self._cache)
        plain = [self._call(tokens[:, None], caches, self._hooks) for _ in range(2)]
        law = self._law if self._law is not None and self._law.acts else None
        try:
            fixed = FixedCache(copied(self._cache))
            arrays = self._law_arrays if law is not None else []
            compiled = [self._layout.finite(step(tokens, fixed, law, arrays)[0]) for _ in range(2)]
            mx.eval(compiled)
        except Exception:  # whatever mlx-lm's modules raise, plain steps remain
            return False
        pairs = zip(compiled, plain, strict=True)
        return all(bool(mx.allclose(a, b, rtol=0, atol=CLOSE * mx.abs(b).max().item()).item()) for a, b in pairs)

    def _place(self, law: Law | None) -> Law | None:
        self._hooks_of_rows = []
        check_site(law, self._layout)
        return super()._place(law)

    def _hooked_layers(self, law: Law) -> Sequence[int]:
        spread = self._layout.spread
        return law.layers if spread is None or self._is_watched else spread.here(law.layers)

    @property
    def _is_watched(self) -> bool:
        """Whether what happens at a block matters beyond it, if it is only for a law that takes notes."""
        return self._is_examined or (self._law is not None and not self._law.replayable)

    def _examined(self, tokens: Sequence[int], steering: LawHooks) -> Examined:
        self._is_examined = True
        try:
            return super()._examined(tokens, steering)
        finally:
            self._is_examined = False

    def _fill(self, prompts: Sequence[Sequence[int]], *, steered: bool) -> None:
        if len(prompts) == 1:
            super()._fill(prompts, steered=steered)
            return
        self._settle()
        restart(self._law)
        self._hooks_of_rows, self._steps = [], 0
        self._start([0] * len(prompts))
        for row, prompt in enumerate(prompts):
            if self._seen is not None and prompt:
                self._seen[row, self._framework.integers(list(prompt))] = True
            for start in range(0, len(prompt), PREFILL_CHUNK):
                chunk = mx.array([list(prompt[start : start + PREFILL_CHUNK])])
                self._call(chunk, self._cache[row], self._hooks if steered else None)
                self._compute(self._cache[row])
        self._length = max(map(len, prompts))
        if self._measurement.merges and all(prompts):
            self._cache, self._apart, self._merged = merged_caches(self._cache), False, True

    def _append(self, tokens: mx.array, *, steered: bool, head: Head = "last") -> mx.array:
        self._length += tokens.shape[1]
        if not self._apart:
            logits = self._call(tokens, self._cache, self._hooks if steered else None, every=head == "all")
        else:
            energies, rows = [], []
            for row, cache in enumerate(self._cache):
                hooks = self._hooks_of_row(row) if steered else None
                rows.append(self._call(tokens[row : row + 1], cache, hooks))
                energies.append(self._energy)
            logits = mx.concatenate(rows)
            self._energy = mx.concatenate([mx.zeros(1) if energy is None else energy for energy in energies])
        if head == "none":
            self._compute(self._cache)
        return logits

    def _compute(self, cache: Any) -> None:
        others = [] if self._layout.spread is None else self._layout.spread.left_to_compute()
        mx.eval(list(arrays_in(cache)), others)

    def sample(self, logits: mx.array) -> mx.array:
        tokens = super().sample(logits)
        if self._layout.spread is not None:
            tokens = self._layout.spread.agreed(tokens)
            self._framework.start([tokens])
        return tokens

    def _left_over(self) -> Iterable[mx.array]:
        # Several processes have to come to what they exchange in one order: only for the token, which all have.
        return () if self._layout.spread is not None else super()._left_over()

    def _hooks_of_row(self, row: int) -> BlockHooks | None:
        if self._law is None or not isinstance(self._law, CarryingLaw | RowLaws):
            return self._hooks
        if not self._hooks_of_rows:
            self._hooks_of_rows = [self._hooks_of(law) for law in self._laws_apart()]
        return self._hooks_of_rows[row]

    def _laws_apart(self) -> Sequence[Law]:
        """A law for each sequence on its own."""
        assert self._law is not None
        if isinstance(self._law, RowLaws):
            return [self._law.of_row(row) for row in range(len(self._law.laws))]
        return [self._framework.place(self._law) for _ in self._lengths]

    def _call(self, tokens: mx.array, cache: Any, hooks: BlockHooks | None, *, every: bool = False) -> mx.array:
        self._energy = None
        spread = self._layout.spread
        with ExitStack() as around:
            if spread is not None and not self._is_watched:
                around.enter_context(spread.unwatched())
            if hooks is not None:
                around.enter_context(hooks.placed())
            logits: mx.array = self._module(tokens, cache=cache)
        return self._layout.finite(logits if every else logits[:, -1])

    def _keep(self, rows: mx.array) -> None:
        if self._apart:
            self._cache = [self._cache[row] for row in rows.tolist()]
            own = self._hooks_of_rows
            self._hooks_of_rows = [own[row] for row in rows.tolist()] if own else []
        else:
            super()._keep(rows)

    @property
    def shares_passes(self) -> bool:
        return self._measurement.merges

    def _take(self, laws: RowLaws) -> None:
        self._hooks_of_rows = []
        super()._take(laws)

    def _join(self, other: MeasuredDecoder) -> None:  # type: ignore[override]
        if self._measurement.merges and not (self._apart or other._apart):
            super()._join(other)
            return
        self._cache = [*self._caches_apart(), *other._caches_apart()]
        self._apart, self._length = True, max(self._length, other._length)

    def _caches_apart(self) -> list[Any]:
        """The caches of each sequence on its own."""
        return self._cache if self._apart else [self._cache]

    def _cache_of(self, row: int) -> list[Any]:
        return list(copied(self._cache[row], lasting=True)) if self._apart else super()._cache_of(row)

    def _another(self) -> MeasuredDecoder:
        return MeasuredDecoder(
            self._module, self._framework, self._layout, self._measurement, None, GREEDY, compiled=self._tried
        )

    def _rewind(self, position: int) -> bool:
        return not self._apart and can_rewind(self._cache) and super()._rewind(position)

    def _trace(self, token: int) -> FrozenTrace:  # type: ignore[override]
        self._settle()
        cache = self._cache or new_caches(self._module)
        differences = self._measurement.differences
        state, blocks = frozen_at(self._module, self._layout, cache, token, differences=differences)
        shared = state.shape[1] - self._layout.width
        if shared != self._measurement.shared:
            raise InputError(
                f"at this prompt blocks share {shared} numbers beside the residual stream, and when the model was "
                f"measured {self._measurement.shared}: use another prompt"
            )
        return FrozenTrace(state, blocks, self._layout.width)

    def _trace_prompt(self, prompt: Sequence[int], held: int) -> FrozenTrace:  # type: ignore[override]
        return HookedDecoder._trace_prompt(self, prompt, held)

    def _new_cache(self, padding: list[int]) -> list[Any]:
        self._apart, self._merged = len(padding) > 1, False
        if self._apart:
            return [new_caches(self._module) for _ in padding]
        if self._window is None:
            return new_caches(self._module)
        if not can_roll(new_caches(self._module)):
            raise InputError("this model's context cannot roll: its layers keep more than keys; let the answer end")
        return decoding_caches(self._module, padding, self._window, SINKS)
