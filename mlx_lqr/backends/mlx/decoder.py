"""Decoding with an mlx-lm module: some sequences side by side, in the module's own kinds of caches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lqr.backends.hooked_decoder import SINKS, Head, HookedDecoder
from mlx_lqr.backends.hooks import BlockCall, Hook
from mlx_lqr.backends.mlx.blocks import FrozenCache, hooked
from mlx_lqr.backends.mlx.copying import arrays_in, copied
from mlx_lqr.backends.mlx.framework import MLXFramework
from mlx_lqr.backends.mlx.gates import Gates
from mlx_lqr.backends.mlx.library import are_of_one_sequence, batched_caches, decoding_caches, in_order
from mlx_lqr.backends.mlx.sampling import MLXSampler
from mlx_lqr.backends.mlx.step import CompiledStep, FixedCache
from mlx_lqr.backends.mlx.tensor_parallel import refuse_split
from mlx_lqr.backends.protocol import GREEDY, CarryingLaw, Float32, Law, Sampling
from mlx_lqr.backends.row_laws import RowLaws

COMPILE_AFTER = 32
"""Steps of an answer before the compiled one takes over: to record it costs what it saves in about 100 tokens."""


@dataclass(frozen=True)
class MLXTrace:
    """What the Jacobians at a prompt's last token depend on."""

    residual: Float32
    """z_0..z_T: (T + 1, d)"""
    calls: list[BlockCall]
    """Block k as a function of its input z (1, 1, d), everything before the last token frozen."""
    nbytes: int
    """Memory held: the prefix's keys and values, and the residual stream."""

    @property
    def state(self) -> Float32:
        """s_k = z_k: (T + 1, d)"""
        return self.residual


class MLXDecoder(HookedDecoder):
    """The `TracingDecoder` protocol.

    Args:
        module: an mlx-lm model.
        blocks, vocabulary, law, sampling, window: see `HookedDecoder`.
        compiled: the model's compiled step, which takes over in long answers of a single sequence; None for never.
        gates: the model's, for passes of many tokens; None where MLX computes them all.
    """

    _framework: MLXFramework

    def __init__(
        self,
        module: nn.Module,
        framework: MLXFramework,
        blocks: Sequence[nn.Module],
        vocabulary: int,
        law: Law | None,
        sampling: Sampling,
        window: int | None = None,
        compiled: CompiledStep | None = None,
        gates: Gates | None = None,
    ) -> None:
        self._module = module
        self._compiled = compiled
        self._gates = gates
        self._length = 0
        self._merged = False
        """Whether the cache is one of a batch, be it of a single sequence."""
        self._fixed: FixedCache | None = None
        """Holds what `_cache` does while steps are compiled."""
        self._steps = 0
        """Since the sequences were last filled."""
        super().__init__(framework, blocks, vocabulary, law, sampling, window)

    @property
    def position(self) -> int:
        return self._length

    def _place(self, law: Law | None) -> Law | None:
        self._law_arrays: list[mx.array] = []
        """Those that the law has been placed with, in the order in which it asked for them."""

        def floats(values: np.ndarray) -> mx.array:
            self._law_arrays.append(self._framework.floats(values))
            return self._law_arrays[-1]

        if law is None:
            return None
        placed = law.to(floats, self._framework.add_product, renew=self._framework.renewed)
        self._framework.start(self._law_arrays)  # here, for steps may be other threads'
        return placed

    def _sampler_of(self, sampling: Sampling) -> MLXSampler:
        return MLXSampler(self._framework, sampling)

    def _fill(self, prompts: Sequence[Sequence[int]], *, steered: bool) -> None:
        self._steps = 0
        super()._fill(prompts, steered=steered)

    def _step(self, tokens: mx.array) -> mx.array:
        self._steps += 1
        if self._compiled is None or self._steps <= COMPILE_AFTER or not self._can_replay(tokens):
            self._settle()
            return self._append(tokens[:, None], steered=True)
        if self._fixed is None:
            self._fixed = FixedCache(self._cache)
        law = self._law if self._law is not None and self._law.acts else None
        logits, self._energy = self._compiled(tokens, self._fixed, law, self._law_arrays if law is not None else [])
        self._length += 1
        return logits

    def _append(self, tokens: mx.array, *, steered: bool, head: Head = "last") -> mx.array:
        self._length += tokens.shape[1]
        self._energy = None
        steering = self._hooks.placed() if steered and self._hooks is not None else nullcontext()
        with steering, self._gates.quick(tokens) if self._gates is not None else nullcontext():
            logits: mx.array = self._module(tokens, cache=self._cache)
        if head == "none":
            mx.eval([layer.state for layer in self._cache])
        return logits if head == "all" else logits[:, -1]

    def _keep(self, rows: mx.array) -> None:
        for layer in self._cache:
            layer.filter(rows)

    def _go_on_alone(self) -> None:
        """In caches and with a law that compiled steps can take; not at once, since it may soon have company."""
        law = self._law.laws[0] if isinstance(self._law, RowLaws) else self._law
        if self._compiled is None or not self._merged or isinstance(law, CarryingLaw):
            return
        self._cache = self._cache_of(0)
        self._length, self._merged, self._steps = self._lengths[0], False, 0
        self._law = self._place(law)
        self._hooks = self._hooks_of(self._law)

    def _join(self, other: MLXDecoder) -> None:
        self._cache, self._merged = self._batched(), True
        for layer, joining in zip(self._cache, other._batched(), strict=True):
            layer.extend(joining)
        self._length = max(self._length, other._length)

    def _batched(self) -> list[Any]:
        """The caches, as those of a batch."""
        return self._cache if self._merged else batched_caches(self._module, self._cache)

    def _copy_of(self, row: int) -> MLXDecoder:
        alone = self._another()
        alone._cache, alone._length = self._cache_of(row), self._lengths[row]
        self._framework.compute(arrays_in(alone._cache))  # or it would hold on to the whole batch
        return alone

    def _cache_of(self, row: int) -> list[Any]:
        """A copy of what is held of one sequence."""
        if not self._merged:
            return list(copied(self._cache, lasting=True))
        return [layer.extract(row) for layer in self._cache]

    def _another(self) -> MLXDecoder:
        """One that holds nothing."""
        return MLXDecoder(
            self._module,
            self._framework,
            self._blocks,
            self._vocabulary,
            None,
            GREEDY,
            compiled=self._compiled,
            gates=self._gates,
        )

    def _rewind(self, position: int) -> bool:
        if not all(layer.is_trimmable() for layer in self._cache):
            return False
        for layer in self._cache:
            layer.trim(self._length - position)
        self._length = position
        return True

    def _trace(self, token: int) -> MLXTrace:
        self._settle()
        frozen = [_frozen(layer) for layer in self._cache]
        residual: list[mx.array] = []
        calls = self._calls(token, frozen, residual)
        return _traced(residual, calls, frozen)

    def _trace_prompt(self, prompt: Sequence[int], held: int) -> MLXTrace:
        """In a single pass, where its last token can be taken back."""
        residual: list[mx.array] = []
        with hooked(self._blocks, _recording(residual, len(self._blocks)), range(len(self._blocks))):
            self._fill([prompt[held:]], steered=False)
        if not self.rewind(len(prompt) - 1):  # a window has lost what the last token would have seen
            self._cache, self._length = [], 0
            self._fill([prompt[:-1]], steered=False)
            return self._trace(prompt[-1])
        frozen = [_frozen(layer) for layer in self._cache]
        return _traced(residual, self._calls(prompt[-1], frozen, []), frozen)

    def _calls(self, token: int, frozen: list[FrozenCache], residual: list[mx.array]) -> list[BlockCall]:
        """How the module calls each block at this token; `residual` takes z_0..z_T. Nothing is computed yet."""
        refuse_split(self._module)
        calls: list[BlockCall] = []
        record = _recording(residual, len(frozen))

        def keep(k: int, z: mx.array, call: BlockCall) -> mx.array:
            calls.append(call)
            return record(k, z, call)

        with hooked(self._blocks, keep, range(len(frozen))):
            self._module(mx.array([[token]]), cache=frozen)
        self._framework.start(arrays_in([[call.args, call.kwargs] for call in calls]))
        return calls

    def _can_replay(self, tokens: mx.array) -> bool:
        """Whether a compiled step can take these tokens (B,), law and cache."""
        if self._law is not None and not self._law.replayable:
            return False
        return self._fixed is not None or are_of_one_sequence(self._cache)

    def _left_over(self) -> Iterable[mx.array]:
        """MLX computes what one thread has asked for in no other; keys and values are all needed for the token."""
        if self._fixed is not None:
            caches: list[Any] = self._fixed.states
        else:
            caches = [
                [part for name, part in vars(layer).items() if name not in ("keys", "values")]
                if hasattr(layer, "__dict__")
                else layer
                for layer in self._cache
            ]
        laws = self._law.laws if isinstance(self._law, RowLaws) else [self._law]
        carried = [list(vars(law).values()) for law in laws if isinstance(law, CarryingLaw)]
        return [*super()._left_over(), *arrays_in(caches), *arrays_in(carried)]

    def _settle(self) -> None:
        """Take the cache back from compiled steps."""
        if self._fixed is not None:
            self._fixed.restore()
            self._fixed = None

    def _new_cache(self, padding: list[int]) -> list[Any]:
        self._merged = len(padding) > 1
        return decoding_caches(self._module, padding, self._window, SINKS)


def _recording(residual: list[mx.array], layers: int) -> Hook:
    """A hook that leaves z_0..z_T at the last position of the last pass in `residual`."""

    def record(k: int, z: mx.array, call: BlockCall) -> mx.array:
        if k == 0:
            residual.clear()
        residual.append(z[0, -1])
        output = call(z)
        if k == layers - 1:
            residual.append(output[0, -1])
        return output

    return record


def _traced(residual: list[mx.array], calls: list[BlockCall], frozen: list[FrozenCache]) -> MLXTrace:
    stacked = mx.stack(residual).astype(mx.float32)
    mx.eval(stacked)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in frozen if layer.keys is not None)
    return MLXTrace(np.asarray(stacked), calls, held + stacked.nbytes)


def _frozen(layer: Any) -> FrozenCache:
    """What a cache of one sequence would show the next token, as constants."""
    if layer.keys is None:
        return FrozenCache()
    keys, values = (part + 0 for part in in_order(layer))  # copies: a view would hold the whole buffer
    mx.eval(keys, values)
    return FrozenCache(keys, values, layer.offset)
