"""Decoding with a model whose caches may be of any kind, a trace of it that knows none of them.

Sequences of a batch read their prompts each alone, so that no padding comes into a state-space cache. Their caches are
then merged, by mlx-lm's own code, where that was measured to agree; else each sequence is run alone at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lqr.backends.hooked_decoder import PREFILL_CHUNK, SINKS
from mlx_lqr.backends.mlx.decoder import MLXDecoder
from mlx_lqr.backends.mlx.framework import MLXFramework
from mlx_lqr.backends.mlx.frozen import FrozenBlock, arrays_in, frozen_at
from mlx_lqr.backends.mlx.layout import Layout
from mlx_lqr.backends.mlx.library import can_rewind, can_roll, decoding_caches, merged_caches, new_caches
from mlx_lqr.backends.mlx.measurement import Measurement
from mlx_lqr.backends.protocol import CarryingLaw, Float32, Law, Sampling, restart
from mlx_lqr.errors import InputError


@dataclass(frozen=True)
class FrozenTrace:
    """What the Jacobians at a prompt's last token depend on."""

    residual: Float32
    """z_0..z_T: (T + 1, d)"""
    blocks: list[FrozenBlock]

    @property
    def nbytes(self) -> int:
        return self.residual.nbytes + sum(block.nbytes for block in self.blocks)


class MeasuredDecoder(MLXDecoder):
    """The `TracingDecoder` protocol."""

    def __init__(
        self,
        module: nn.Module,
        framework: MLXFramework,
        layout: Layout,
        measurement: Measurement,
        law: Law | None,
        sampling: Sampling,
        window: int | None = None,
    ) -> None:
        self._layout, self._measurement = layout, measurement
        self._apart = False
        """Whether `_cache` holds the caches of each sequence on its own."""
        super().__init__(module, framework, layout.blocks, layout.vocabulary, law, sampling, window)

    def fill(self, prompts: Sequence[Sequence[int]], *, steered: bool) -> None:
        if len(prompts) == 1:
            super().fill(prompts, steered=steered)
            return
        restart(self._law)
        self._start([0] * len(prompts))
        for row, prompt in enumerate(prompts):
            if self._seen is not None and prompt:
                self._seen[row, self._framework.integers(list(prompt))] = True
            for start in range(0, len(prompt), PREFILL_CHUNK):
                chunk = mx.array([list(prompt[start : start + PREFILL_CHUNK])])
                self._call(chunk, self._cache[row], steered=steered)
                mx.eval(list(arrays_in(self._cache[row])))
        self._length = max(map(len, prompts))
        if self._measurement.merges and all(prompts):
            self._cache, self._apart = merged_caches(self._cache), False

    def _append(self, tokens: mx.array, *, steered: bool, head: bool = True) -> mx.array:
        self._length += tokens.shape[1]
        if not self._apart:
            logits = self._call(tokens, self._cache, steered=steered)
        else:
            if isinstance(self._law, CarryingLaw) and steered:
                raise InputError("this model decodes a batch one by one, which this controller cannot: give one prompt")
            energies, rows = [], []
            for row, cache in enumerate(self._cache):
                rows.append(self._call(tokens[row : row + 1], cache, steered=steered))
                energies.append(self._energy)
            logits = mx.concatenate(rows)
            present = [energy for energy in energies if energy is not None]
            self._energy = mx.concatenate(present) if present else None
        if not head:
            mx.eval(list(arrays_in(self._cache)))
        return logits

    def _call(self, tokens: mx.array, cache: Any, *, steered: bool) -> mx.array:
        self._energy = None
        with self._hooks.placed() if steered and self._hooks is not None else nullcontext():
            logits: mx.array = self._module(tokens, cache=cache)
        return self._layout.finite(logits[:, -1])

    def _keep(self, rows: mx.array) -> None:
        if self._apart:
            self._cache = [self._cache[row] for row in rows.tolist()]
        else:
            super()._keep(rows)

    def _rewind(self, position: int) -> bool:
        return not self._apart and can_rewind(self._cache) and super()._rewind(position)

    def trace(self, token: int) -> FrozenTrace:  # type: ignore[override]
        cache = self._cache or new_caches(self._module)
        differences = self._measurement.differences
        return FrozenTrace(*frozen_at(self._module, self._layout, cache, token, differences=differences))

    def trace_prompt(self, prompt: Sequence[int]) -> FrozenTrace:  # type: ignore[override]
        if len(prompt) > 1:
            self.fill([prompt[:-1]], steered=False)
        return self.trace(prompt[-1])

    def _new_cache(self, padding: list[int]) -> list[Any]:
        self._apart = len(padding) > 1
        if self._apart:
            return [new_caches(self._module) for _ in padding]
        if self._window is None:
            return new_caches(self._module)
        if not can_roll(new_caches(self._module)):
            raise InputError("this model's context cannot roll: its layers keep more than keys; let the answer end")
        return decoding_caches(self._module, padding, self._window, SINKS)
