"""Decoding with a model whose cache may be of any kind, a trace of it that knows none of them.

Each sequence has a cache of its own and is run alone at every step, so that no padding comes into a state-space cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mlx_lqr.backends.hooked_decoder import PREFILL_CHUNK, Head, HookedDecoder
from mlx_lqr.backends.hooks import BlockHooks, LawHooks
from mlx_lqr.backends.overflow import Examined
from mlx_lqr.backends.protocol import GREEDY, CarryingLaw, Float32, Law, Sampling, restart
from mlx_lqr.backends.row_laws import RowLaws
from mlx_lqr.backends.torch.copying import copied
from mlx_lqr.backends.torch.framework import TorchFramework
from mlx_lqr.backends.torch.frozen import FrozenBlock, frozen_at
from mlx_lqr.backends.torch.layout import Layout
from mlx_lqr.backends.torch.library import cropped
from mlx_lqr.backends.torch.measurement import Measurement
from mlx_lqr.backends.torch.sampling import TorchSampler
from mlx_lqr.errors import InputError


@dataclass(frozen=True)
class FrozenTrace:
    """What the Jacobians at a prompt's last token depend on."""

    residual: Float32
    """z_0..z_T: (T + 1, d)"""
    blocks: list[FrozenBlock]
    nbytes: int

    @property
    def state(self) -> Float32:
        """s_k = z_k: (T + 1, d)"""
        return self.residual


class MeasuredDecoder(HookedDecoder):
    """The `TracingDecoder` protocol.

    Args:
        module: a transformers model for causal language modelling.
        law, sampling, window: see `HookedDecoder`.
    """

    _framework: TorchFramework
    _cache: list[Any] | None
    """Of each sequence, what the model has returned; None for nothing yet."""
    _own_hooks: list[BlockHooks | None]
    """Of each sequence of several, where the law carries something from token to token; else empty."""

    def __init__(
        self,
        module: Any,
        framework: TorchFramework,
        layout: Layout,
        measurement: Measurement,
        law: Law | None,
        sampling: Sampling,
        window: int | None = None,
    ) -> None:
        self._module, self._layout, self._measurement = module, layout, measurement
        self._length = 0
        super().__init__(framework, layout.blocks, layout.vocabulary, law, sampling, window)

    @property
    def position(self) -> int:
        return self._length

    def _place(self, law: Law | None) -> Law | None:
        self._given, self._own_hooks = law, []
        placed: Law | None = self._framework.place(law)
        return placed

    def _sampler_of(self, sampling: Sampling) -> TorchSampler:
        return TorchSampler(self._framework, sampling)

    def _settle(self) -> None:
        """The cache has one form alone."""

    def _new_cache(self, padding: list[int]) -> list[Any]:
        if self._window is not None:
            raise InputError("this model's context cannot roll: its cache is transformers' own; let the answer end")
        self._length, self._own_hooks = 0, []
        if isinstance(self._law, CarryingLaw) and len(padding) > 1:
            self._own_hooks = [self._hooks_of(self._place_another()) for _ in padding]
        return [None] * len(padding)

    def _place_another(self) -> Law:
        """The law once more, to carry something for one sequence of several."""
        assert self._given is not None
        law = self._given.to(self._framework.floats, self._framework.add_product)
        restart(law)
        return law

    def _fill(self, prompts: Sequence[Sequence[int]], *, steered: bool) -> None:
        restart(self._law)
        if not self._cache:
            self._start([0] * len(prompts))
        for row, prompt in enumerate(prompts):
            tokens = self._framework.integers([list(prompt)])
            if self._seen is not None:
                self._seen[row, tokens[0]] = True
            for piece in self._pieces(row, tokens):
                self._call(row, piece, steered=steered)
        self._length += max(map(len, prompts))

    def _pieces(self, row: int, tokens: torch.Tensor) -> Sequence[torch.Tensor]:
        """Tokens (1, L) as they can be run after what is there."""
        assert self._cache is not None
        if not tokens.shape[1]:
            return []
        if self._measurement.appends:
            return tokens.split(PREFILL_CHUNK, dim=1)
        return [tokens] if self._cache[row] is None else tokens.split(1, dim=1)

    def _step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._append(tokens[:, None], steered=True)

    def _append(self, tokens: torch.Tensor, *, steered: bool, head: Head = "last") -> torch.Tensor:
        energies, rows = [], []
        for row in range(len(tokens)):
            for piece in self._pieces(row, tokens[row : row + 1]):
                logits = self._call(row, piece, steered=steered, every=head == "all")
            rows.append(logits)
            energies.append(self._energy)
        none = torch.zeros(1, device=self._framework.device)
        self._energy = torch.cat([none if energy is None else energy for energy in energies])
        self._length += tokens.shape[1]
        return torch.cat(rows)

    def _call(self, row: int, tokens: torch.Tensor, *, steered: bool, every: bool = False) -> torch.Tensor:
        """Run tokens (1, L) of one sequence: the last one's logits (1, V), or those of every one (1, L, V)."""
        assert self._cache is not None
        self._energy = None
        hooks = self._own_hooks[row] if self._own_hooks else self._hooks
        with hooks.placed() if steered and hooks is not None else nullcontext():
            logits, self._cache[row] = self._layout.call(self._module, tokens, self._cache[row], last=not every)
        return logits if every else logits[:, -1]

    def logits_along(self, tokens: Sequence[int], *, steered: bool) -> Float32:
        """See `Decoder`."""
        if not self._cache:
            self._start([0])
        pieces = self._pieces(0, self._framework.integers([list(tokens)]))
        along = [super(MeasuredDecoder, self).logits_along(piece[0].tolist(), steered=steered) for piece in pieces]
        return np.concatenate(along)

    def _examined(self, tokens: Sequence[int], steering: LawHooks) -> Examined:
        """In pieces, since each is a pass of its own, whose activations are those of all blocks in turn."""
        pieces = self._pieces(0, self._framework.integers([list(tokens)]))
        parts = [super(MeasuredDecoder, self)._examined(piece[0].tolist(), steering) for piece in pieces]
        energies = [[value for part, _ in parts for value in part[k]] for k in range(len(self._blocks) + 1)]
        return energies, all(finite for _, finite in parts)

    def _join(self, other: MeasuredDecoder) -> None:
        assert self._cache is not None
        assert other._cache is not None
        self._cache = [*self._cache, *other._cache]
        self._length = max(self._length, other._length)

    def _copy_of(self, row: int) -> MeasuredDecoder:
        assert self._cache is not None
        alone = MeasuredDecoder(self._module, self._framework, self._layout, self._measurement, None, GREEDY)
        alone._cache, alone._length = [copied(self._cache[row])], self._lengths[row]
        return alone

    @property
    def shares_passes(self) -> bool:
        return False

    @property
    def fills_in_parts(self) -> bool:
        return self._measurement.appends

    def _take(self, laws: RowLaws) -> None:
        super()._take(laws)
        self._own_hooks = [self._hooks_of(laws.of_row(row)) for row in range(len(laws.laws))]

    def _keep(self, rows: torch.Tensor) -> None:
        assert self._cache is not None
        self._cache = [self._cache[row] for row in rows.tolist()]
        self._own_hooks = self._own_hooks and [self._own_hooks[row] for row in rows.tolist()]

    def _rewind(self, position: int) -> bool:
        assert self._cache is not None
        if len(self._cache) > 1 or not self._measurement.crops:
            return False
        if position < self._length:
            shorter = cropped(copied(self._cache[0]), self._length - position) if position else None
            if shorter is None and position:
                return False
            self._cache[0], self._length = shorter, position
        return True

    def _trace(self, token: int) -> FrozenTrace:
        cache = self._cache[0] if self._cache else None
        differences = self._measurement.differences
        return FrozenTrace(*frozen_at(self._module, self._layout, cache, token, differences=differences))
