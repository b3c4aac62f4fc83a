"""Decoding with an mlx-lm module: some sequences side by side, in the module's own kinds of caches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lqr.backends.batching import padded_left
from mlx_lqr.backends.hooks import BlockCall, Hook, LawHooks
from mlx_lqr.backends.mlx.blocks import BlockHooks, FrozenCache, hooked
from mlx_lqr.backends.mlx.mlx_lm_models import import_mlx_lm
from mlx_lqr.backends.mlx.sampling import Sampler
from mlx_lqr.backends.mlx.step import CompiledStep, FixedCache, energy, in_order
from mlx_lqr.backends.overflow import Examined, located
from mlx_lqr.backends.protocol import OVERFLOWED, CarryingLaw, Float32, Law, Sampling, restart
from mlx_lqr.errors import InputError, OverflowingError

PREFILL_CHUNK = 512
"""Prompt tokens, of all sequences together, per forward pass while the cache is filled."""
COMPILE_AFTER = 32
"""Steps of an answer before the compiled one takes over: to record it costs what it saves in about 100 tokens."""
SINKS = 4
"""How many of the oldest tokens a rolling cache keeps: attention leans on them (arXiv 2309.17453)."""


@dataclass(frozen=True)
class MLXTrace:
    """What the Jacobians at a prompt's last token depend on."""

    residual: Float32
    """z_0..z_T: (T + 1, d)"""
    calls: list[BlockCall]
    """Block k as a function of its input z (1, 1, d), everything before the last token frozen."""
    nbytes: int
    """Memory held: the prefix's keys and values, and the residual stream."""


class MLXDecoder:
    """The `Decoder` protocol (see base.py).

    Args:
        module: an mlx-lm model.
        array: makes a law's arrays.
        law, sampling: see the protocol.
        window: how many tokens a rolling context holds; None where it does not roll.
        compiled: the model's compiled step, which takes over in long answers of a single sequence; None for never.
    """

    def __init__(
        self,
        module: nn.Module,
        array: Callable[[np.ndarray], mx.array],
        law: Law | None,
        sampling: Sampling,
        window: int | None = None,
        compiled: CompiledStep | None = None,
    ) -> None:
        self._module = module
        self._blocks: list[nn.Module] = module.layers
        self._array = array
        self._window = window
        self._compiled = compiled
        self._cache: list[Any] = []
        self._fixed: FixedCache | None = None
        """Holds what `_cache` does while steps are compiled."""
        self._steps = 0
        """Since the sequences were last filled."""
        self._energy: mx.array | None = None
        """|z|^2 (B,) after the last steered block of the last step: not finite once activations overflow."""
        self._seen: mx.array | None = None
        """(B, V): the tokens met so far, for the repetition penalty."""
        self.law = law
        self.sampling = sampling
        self.position = 0

    @property
    def law(self) -> Law | None:
        return self._law

    @law.setter
    def law(self, law: Law | None) -> None:
        arrays: list[mx.array] = []

        def made(values: np.ndarray) -> mx.array:
            arrays.append(self._array(values))
            return arrays[-1]

        def renewed(array: mx.array, values: np.ndarray) -> mx.array:
            array[...] = self._array(values)
            return array

        self._law = placed = law.place(made, mx.addmm, renew=renewed) if law is not None else None
        self._law_arrays = arrays
        self._hooks: BlockHooks | None = None
        if placed is None or not placed.layers:
            return
        steering, last = LawHooks(placed), max(placed.layers)

        def hook(k: int, z: mx.array, call: BlockCall) -> mx.array:
            output = steering.block(k, z, call)
            if k == last:
                self._energy = energy(output[:, -1])
            return output

        self._hooks = BlockHooks(self._blocks, hook, placed.layers, steering)

    @property
    def sampling(self) -> Sampling:
        return self._sampler.sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._sampler = Sampler(sampling)

    def fill(self, prompts: Sequence[Sequence[int]], *, steered: bool) -> None:
        self._settle()
        restart(self._law)
        self._steps = 0
        width = max(len(prompt) for prompt in prompts)
        if not self._cache:
            self._start([width - len(prompt) for prompt in prompts])
        if self._seen is not None:
            for row, prompt in enumerate(prompts):
                self._seen[row, mx.array(list(prompt), mx.uint32)] = True
        tokens = mx.array(padded_left(prompts), mx.uint32)
        chunk = max(1, PREFILL_CHUNK // len(prompts))
        for start in range(0, width, chunk):
            self._run(tokens[:, start : start + chunk], steered=steered)
            mx.eval([layer.state for layer in self._cache])

    def step(self, tokens: mx.array | Sequence[int]) -> mx.array:
        tokens = tokens if isinstance(tokens, mx.array) else mx.array(tokens, mx.uint32)
        if self._seen is not None:
            self._seen[mx.arange(tokens.size), tokens] = True
        self._steps += 1
        if self._compiled is None or self._steps <= COMPILE_AFTER or not self._can_replay():
            self._settle()
            return self._run(tokens[:, None], steered=True)[:, -1]
        if self._fixed is None:
            self._fixed = FixedCache(self._cache)
        self.position += 1
        law = self._law if self._law is not None and self._law.acts else None
        logits, self._energy = self._compiled(tokens, self._fixed, law, self._law_arrays if law is not None else [])
        return logits

    def sample(self, logits: mx.array) -> mx.array:
        spoiled = (logits * 0).sum(axis=-1)  # 0, or NaN where one of them is not finite
        if self._energy is not None:
            spoiled = spoiled + self._energy * 0
        if self._seen is not None:
            penalty = self.sampling.repetition_penalty
            logits = mx.where(self._seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
        tokens = self._sampler.draw(logits)
        tokens = mx.where(spoiled == 0, tokens.astype(mx.int32), OVERFLOWED)
        mx.async_eval(tokens)
        return tokens

    def keep(self, rows: Sequence[int], tokens: mx.array) -> mx.array:
        self._settle()
        chosen = mx.array(list(rows))
        for layer in self._cache:
            layer.filter(chosen)
        if isinstance(self._law, CarryingLaw):
            self._law.keep(chosen)
        self._sampler.keep(chosen)
        if self._seen is not None:
            self._seen = self._seen[chosen]
        return tokens[chosen]

    def rewind(self, position: int) -> bool:
        self._settle()
        if not self._cache or self._seen is not None or not all(layer.is_trimmable() for layer in self._cache):
            return False
        for layer in self._cache:
            layer.trim(self.position - position)
        self.position = position
        return True

    def trace(self, token: int) -> MLXTrace:
        self._settle()
        frozen = [_frozen(layer) for layer in self._cache]
        residual: list[mx.array] = []
        calls = self._calls(token, frozen, residual)
        return _traced(residual, calls, frozen)

    def trace_prompt(self, prompt: Sequence[int]) -> MLXTrace:
        """`fill` of all but the last token and `trace` of that one, but in a single pass where it can be taken back."""
        residual: list[mx.array] = []
        with hooked(self._blocks, _recording(residual, len(self._blocks)), range(len(self._blocks))):
            self.fill([prompt], steered=False)
        if not self.rewind(len(prompt) - 1):  # a window has lost what the last token would have seen
            self._cache, self.position = [], 0
            self.fill([prompt[:-1]], steered=False)
            return self.trace(prompt[-1])
        frozen = [_frozen(layer) for layer in self._cache]
        return _traced(residual, self._calls(prompt[-1], frozen, []), frozen)

    def _calls(self, token: int, frozen: list[FrozenCache], residual: list[mx.array]) -> list[BlockCall]:
        """How the module calls each block at this token; `residual` takes z_0..z_T. Nothing is computed yet."""
        calls: list[BlockCall] = []
        record = _recording(residual, len(frozen))

        def keep(k: int, z: mx.array, call: BlockCall) -> mx.array:
            calls.append(call)
            return record(k, z, call)

        with hooked(self._blocks, keep, range(len(frozen))):
            self._module(mx.array([[token]]), cache=frozen)
        return calls

    def overflow(self, tokens: Sequence[int], first: int) -> OverflowingError:
        self._start([0])
        restart(self._law)
        return located(
            self._examined,
            tokens,
            first,
            self._law,
            layers=len(self._blocks),
            chunk=PREFILL_CHUNK,
            dtype=self._dtype,
        )

    def _examined(self, tokens: Sequence[int], steering: LawHooks) -> Examined:
        energies: list[mx.array] = []

        def record(k: int, z: mx.array, call: BlockCall) -> mx.array:
            if k == 0:
                energies.append(energy(z)[0])
            output = steering.block(k, z, call)
            energies.append(energy(output)[0])
            mx.eval(output, energies)  # block by block, or the intermediates of all blocks are held at once
            return output

        with hooked(self._blocks, record, range(len(self._blocks)), steering):
            logits = self._module(mx.array([list(tokens)], mx.uint32), cache=self._cache)
        return [row.tolist() for row in energies], bool(mx.all(mx.isfinite(logits[0, -1])).item())

    @property
    def _dtype(self) -> str:
        return str(self._array(np.zeros(1, np.float32)).dtype).rpartition(".")[2]

    def _can_replay(self) -> bool:
        """Whether a compiled step can take law and cache."""
        if self._law is not None and not self._law.replayable:
            return False
        return self._fixed is not None or FixedCache.can_take(self._cache)

    def _settle(self) -> None:
        """Take the cache back from compiled steps."""
        if self._fixed is not None:
            self._fixed.restore()
            self._fixed = None

    def _start(self, padding: list[int]) -> None:
        """Make the caches for sequences with this much padding on their left."""
        kinds = import_mlx_lm("models.cache")
        self._cache = kinds.make_prompt_cache(self._module)
        if self._window is not None:
            if len(padding) > 1:
                raise InputError("a batch cannot roll its context: decode one prompt at a time")
            self._cache = [
                layer if _held(layer) < self._window else kinds.RotatingKVCache(self._window, keep=SINKS)
                for layer in self._cache
            ]
        if len(padding) > 1:
            self._cache = [
                kinds.BatchRotatingKVCache(layer.max_size, padding)
                if isinstance(layer, kinds.RotatingKVCache)
                else kinds.BatchKVCache(padding)
                for layer in self._cache
            ]
            if self._module.model_type == "gemma2" and self._blocks[0].self_attn.repeats > 1:
                for layer in self._cache:
                    layer.make_mask = _for_grouped_heads(layer.make_mask)
        if self.sampling.repetition_penalty != 1:
            self._seen = mx.zeros((len(padding), int(self._module.args.vocab_size)), mx.bool_)

    def _run(self, tokens: mx.array, *, steered: bool) -> mx.array:
        """Logits (B, L, V) of tokens (B, L), all of them steered or none."""
        self.position += tokens.shape[1]
        self._energy = None
        with self._hooks.placed() if steered and self._hooks is not None else nullcontext():
            return self._module(tokens, cache=self._cache)


def _held(layer: Any) -> float:
    """How many tokens one of mlx-lm's caches keeps."""
    size: float = getattr(layer, "max_size", math.inf)
    return size


def _for_grouped_heads(make_mask: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Masks (B, 1, 1, L, S) for attention that computes its scores by groups of heads, as mlx-lm's Gemma 2 does; it
    has no place for a mask (B, 1, L, S) of a batch."""
    return lambda *args, **kwargs: make_mask(*args, **kwargs)[:, :, None]


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
