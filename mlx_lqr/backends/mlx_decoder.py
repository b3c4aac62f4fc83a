"""Decoding with an mlx-lm module: some sequences side by side, in the module's own kinds of caches."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lqr.backends.base import OVERFLOWED, Float32, Law, Sampling
from mlx_lqr.backends.mlx_blocks import BlockCall, BlockHooks, FrozenCache, hooked
from mlx_lqr.backends.mlx_lm_models import import_mlx_lm
from mlx_lqr.errors import InputError

PREFILL_CHUNK = 512
"""Prompt tokens, of all sequences together, per forward pass while the cache is filled."""
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
        place: gives a law arrays of this module's kind.
        law, sampling: see the protocol.
        window: how many tokens a rolling context holds; None where it does not roll.
    """

    def __init__(
        self,
        module: nn.Module,
        place: Callable[[Law | None], Law | None],
        law: Law | None,
        sampling: Sampling,
        window: int | None = None,
    ) -> None:
        self._module = module
        self._blocks: list[nn.Module] = module.layers
        self._place = place
        self._window = window
        self._cache: list[Any] = []
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
        self._law = placed = self._place(law)
        self._hooks: BlockHooks | None = None
        if placed is None or not placed.layers:
            return
        last = max(placed.layers)

        def hook(k: int, z: mx.array, call: BlockCall) -> mx.array:
            output = placed(k, z, call(z))
            if k == last:
                self._energy = _energy(output)
            return output

        self._hooks = BlockHooks(self._blocks, hook, placed.layers)

    @property
    def sampling(self) -> Sampling:
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._keys: mx.array | None = None  # (B, 2), made when the number of sequences is known
        self._seed = sampling.seed if sampling.seed is not None else secrets.randbits(32)

    def fill(self, prompts: Sequence[Sequence[int]], *, steered: bool) -> None:
        width = max(len(prompt) for prompt in prompts)
        if not self._cache:
            self._start([width - len(prompt) for prompt in prompts])
        if self._seen is not None:
            for row, prompt in enumerate(prompts):
                self._seen[row, mx.array(list(prompt), mx.uint32)] = True
        tokens = mx.array([[*[0] * (width - len(prompt)), *prompt] for prompt in prompts], mx.uint32)
        chunk = max(1, PREFILL_CHUNK // len(prompts))
        for start in range(0, width, chunk):
            self._run(tokens[:, start : start + chunk], steered=steered)
            mx.eval([layer.state for layer in self._cache])

    def step(self, tokens: mx.array | Sequence[int]) -> mx.array:
        tokens = tokens if isinstance(tokens, mx.array) else mx.array(tokens, mx.uint32)
        if self._seen is not None:
            self._seen[mx.arange(tokens.size), tokens] = True
        return self._run(tokens[:, None], steered=True)[:, -1]

    def sample(self, logits: mx.array) -> mx.array:
        if self._seen is not None:
            penalty = self._sampling.repetition_penalty
            logits = mx.where(self._seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
        tokens = self._draw(logits)
        if self._energy is not None:
            tokens = mx.where(self._energy < math.inf, tokens.astype(mx.int32), OVERFLOWED)  # false for NaN too
        mx.async_eval(tokens)
        return tokens

    def keep(self, rows: Sequence[int], tokens: mx.array) -> mx.array:
        chosen = mx.array(list(rows))
        for layer in self._cache:
            layer.filter(chosen)
        if self._keys is not None:
            self._keys = self._keys[chosen]
        if self._seen is not None:
            self._seen = self._seen[chosen]
        return tokens[chosen]

    def rewind(self, position: int) -> bool:
        if not self._cache or self._seen is not None or not all(layer.is_trimmable() for layer in self._cache):
            return False
        for layer in self._cache:
            layer.trim(self.position - position)
        self.position = position
        return True

    def trace(self, token: int) -> MLXTrace:
        frozen = [_frozen(layer) for layer in self._cache]
        residual: list[mx.array] = []
        calls: list[BlockCall] = []

        def record(k: int, z: mx.array, call: BlockCall) -> mx.array:
            calls.append(call)
            residual.append(z[0, -1])
            output = call(z)
            if k == len(frozen) - 1:
                residual.append(output[0, -1])
            return output

        with hooked(self._blocks, record, range(len(frozen))):
            self._module(mx.array([[token]]), cache=frozen)
        stacked = mx.stack(residual).astype(mx.float32)
        mx.eval(stacked)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in frozen if layer.keys is not None)
        return MLXTrace(np.asarray(stacked), calls, held + stacked.nbytes)

    def overflowing_layer(self, tokens: mx.array | Sequence[int]) -> int | None:
        energies: list[mx.array] = []

        def record(k: int, z: mx.array, call: BlockCall) -> mx.array:
            output = call(z)
            if self._law is not None and k in self._law.layers:
                output = self._law(k, z, output)
            energies.append(_energy(output).sum())
            return output

        self.position += 1
        with hooked(self._blocks, record, range(len(self._blocks))):
            self._module(mx.array(tokens, mx.uint32)[:, None], cache=self._cache)
        finite = mx.isfinite(mx.stack(energies)).tolist()
        return finite.index(False) if False in finite else None

    def _start(self, padding: list[int]) -> None:
        """Make the caches for sequences with this much padding on their left."""
        kinds = import_mlx_lm("models.cache")
        self._cache = kinds.make_prompt_cache(self._module)
        if self._window is not None:
            if len(padding) > 1:
                raise InputError("a batch cannot roll its context: decode one prompt at a time")
            self._cache = [
                kinds.RotatingKVCache(self._window, keep=SINKS) if isinstance(layer, kinds.KVCache) else layer
                for layer in self._cache
            ]
        if len(padding) > 1:
            self._cache = [
                kinds.BatchRotatingKVCache(layer.max_size, padding)
                if isinstance(layer, kinds.RotatingKVCache)
                else kinds.BatchKVCache(padding)
                for layer in self._cache
            ]
            attention = self._blocks[0].get("self_attn")
            if hasattr(attention, "attn_logit_softcapping") and getattr(attention, "repeats", 1) > 1:
                for layer in self._cache:
                    layer.make_mask = _for_grouped_heads(layer.make_mask)
        if self._sampling.repetition_penalty != 1:
            self._seen = mx.zeros((len(padding), int(self._module.args.vocab_size)), mx.bool_)

    def _run(self, tokens: mx.array, *, steered: bool) -> mx.array:
        """Logits (B, L, V) of tokens (B, L), all of them steered or none."""
        self.position += tokens.shape[1]
        self._energy = None
        with self._hooks.placed() if steered and self._hooks is not None else nullcontext():
            return self._module(tokens, cache=self._cache)

    def _draw(self, logits: mx.array) -> mx.array:
        """A token (B,) from each row of logits (B, V), each row with a random state of its own."""
        sampling = self._sampling
        if sampling.temperature == 0:
            return mx.argmax(logits, axis=-1)
        library = import_mlx_lm("sample_utils")
        logprobs = (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(mx.float32)
        if sampling.top_p < 1:
            logprobs = library.apply_top_p(logprobs, sampling.top_p)
        if sampling.min_p > 0:
            logprobs = library.apply_min_p(logprobs, sampling.min_p)
        if 0 < sampling.top_k < int(self._module.args.vocab_size):
            logprobs = library.apply_top_k(logprobs, sampling.top_k)
        if self._keys is None:
            self._keys = mx.stack([mx.random.key(self._seed + row) for row in range(len(logits))])
        split = mx.vmap(mx.random.split)(self._keys)  # (B, 2, 2)
        self._keys = split[:, 0]
        draw: Callable[[mx.array, mx.array], mx.array] = mx.vmap(lambda row, key: mx.random.categorical(row, key=key))
        return draw(logprobs / sampling.temperature, split[:, 1])


def _for_grouped_heads(make_mask: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Masks (B, 1, 1, L, S) for attention that computes its scores by groups of heads, as mlx-lm's Gemma 2 does; it
    has no place for a mask (B, 1, L, S) of a batch."""
    return lambda *args, **kwargs: make_mask(*args, **kwargs)[:, :, None]


def _energy(output: mx.array) -> mx.array:
    """|z|^2 (B,) at the last position of a block's output (B, L, d)."""
    last = output[:, -1].astype(mx.float32)
    return (last * last).sum(axis=-1)


def _frozen(layer: Any) -> FrozenCache:
    """What a cache of one sequence would show the next token, as constants."""
    if layer.keys is None:
        return FrozenCache()
    if hasattr(layer, "max_size"):  # a sliding window: in the order of time, without what the next token sees no more
        kept = [layer._temporal_order(part) for part in (layer.keys, layer.values)]
        gone = max(0, kept[0].shape[-2] - (layer.max_size - 1))
        kept = [mx.concatenate([a[..., : layer.keep, :], a[..., layer.keep + gone :, :]], axis=-2) for a in kept]
    else:
        kept = [part[..., : layer.offset, :] for part in (layer.keys, layer.values)]
    keys, values = (part + 0 for part in kept)  # copies: a view would hold the whole buffer, which has room for more
    mx.eval(keys, values)
    return FrozenCache(keys, values, layer.offset)
