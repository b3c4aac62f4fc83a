"""A decode step of a single sequence as one compiled function of arrays.

`mx.compile` records the operations of a call once and replays them fused. What changes from token to token must then
be an array: the token, the position, the cache's buffers, whose size is fixed for many tokens, the weights, and all
arrays of the law, so that another strength, or another controller of the same layers, replays what was recorded for the
first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lqr.backends.hooks import BlockCall, LawHooks
from mlx_lqr.backends.mlx.blocks import ClassHooks
from mlx_lqr.backends.mlx.framework import energy
from mlx_lqr.backends.mlx.library import hand_back, in_order, keeps_state, rotates, state_cache
from mlx_lqr.backends.protocol import Law

STEP = 256
"""Slots by which buffers grow, as mlx-lm's caches do; the step is recorded once for each size."""

Buffers = list[tuple[mx.array, ...]]
"""Keys and values (1, heads, slots, head_dim) of every layer, or the arrays of its state."""


class FixedCache:
    """What a decode's caches hold, in buffers with room for further tokens; takes it from `layers` until `restore`.

    Where a layer keeps a window, or all but the oldest few, token p lies in slot p until the buffer is full, and then
    in the place of the token that is to be forgotten. Keys are rotated already, so that their order is of no matter.

    Args:
        layers: mlx-lm's caches, see `library.are_of_one_sequence`.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self.length = next((int(layer.offset) for layer in layers if not keeps_state(layer)), 0)
        self.keep = [None if keeps_state(layer) else layer.keep if rotates(layer) else 0 for layer in layers]
        """How many of the oldest tokens a layer keeps; None of one that keeps a state"""
        self.limits = [layer.max_size if rotates(layer) else None for layer in layers]
        self.buffers: Buffers = []
        for layer, limit, keep in zip(layers, self.limits, self.keep, strict=True):
            if keep is None:
                self.buffers.append(tuple(layer.cache))
                continue
            keys, values = in_order(layer)
            place = self._placing(keys.shape[-2], limit, keep)
            self.buffers.append((place(keys), place(values)))
            layer.keys = layer.values = None  # or a second reference would force a copy at every token

    @property
    def states(self) -> list[tuple[mx.array, ...]]:
        """Those of layers that keep no keys and values."""
        return [parts for parts, keep in zip(self.buffers, self.keep, strict=True) if keep is None]

    def make_room(self) -> None:
        """Let the buffers grow where the next token has no slot."""
        for i, (keep, limit, parts) in enumerate(zip(self.keep, self.limits, self.buffers, strict=True)):
            if keep is not None and (size := self._size(limit)) > parts[0].shape[-2]:
                self.buffers[i] = tuple(_grown(part, size) for part in parts)

    def restore(self) -> None:
        """Hand everything back to mlx-lm's caches."""
        for layer, keep, parts in zip(self._layers, self.keep, self.buffers, strict=True):
            if keep is None:
                layer.cache = list(parts)
                continue
            keys, values = parts
            size = keys.shape[-2]
            if rotates(layer) and self.length < size:
                keys, values = keys[..., : self.length, :], values[..., : self.length, :]
            elif rotates(layer) and self.length > size:
                oldest = keep + (self.length - keep) % (size - keep)
                order = mx.array([*range(keep), *range(oldest, size), *range(keep, oldest)])
                keys, values = keys[..., order, :], values[..., order, :]
            hand_back(layer, keys, values, self.length)

    def _placing(self, held: int, limit: int | None, keep: int) -> Callable[[mx.array], mx.array]:
        """How to put the `held` tokens of a layer, in the order of time, into their slots."""
        size = self._size(limit)
        if held == self.length:
            return lambda part: _grown(part, size)
        recent = range(self.length - held + keep, self.length)  # the others have been forgotten
        slots = mx.array([*range(keep), *(keep + (p - keep) % (size - keep) for p in recent)])

        def place(part: mx.array) -> mx.array:
            buffer = mx.zeros((*part.shape[:2], size, part.shape[-1]), part.dtype)
            buffer[..., slots, :] = part
            return buffer

        return place

    def _size(self, limit: int | None) -> int:
        """Slots with which there is room for one more token, or those of the full window."""
        size = (self.length // STEP + 1) * STEP
        return size if limit is None else min(size, limit)


class CompiledStep:
    """Steps of one model, recorded once for every kind of law and cache.

    Args:
        blocks: by default the module's layers.
        hooks: how the law is placed on them.
    """

    def __init__(
        self, module: nn.Module, blocks: Sequence[nn.Module] | None = None, hooks: type[ClassHooks] = ClassHooks
    ) -> None:
        self._module = module
        self._blocks: Sequence[nn.Module] = module.layers if blocks is None else blocks
        self._hooks = hooks
        self._recorded: dict[Any, Callable[..., tuple[mx.array, mx.array | None, Buffers]]] = {}
        self._signatures: set[Any] = set()
        """What steps were recorded for: the kind of law and cache, and the sizes of buffers."""

    def __call__(
        self, tokens: mx.array, cache: FixedCache, law: Law | None, arrays: list[mx.array]
    ) -> tuple[mx.array, mx.array | None]:
        """Append a token (1,) and return the next one's logits (1, V), and |z|^2 (1,) after the last steered block.

        Args:
            law: what steers, if anything does.
            arrays: those that the law has been placed with, in the order in which it asked for them.
        """
        if law is not None:
            law.aim()
        kind = None if law is None else (type(law), tuple(law.layers), tuple(array.shape for array in arrays))
        key = kind, tuple(cache.keep), tuple(cache.limits)
        if key not in self._recorded:
            step = self._step(law, cache.keep, cache.limits)
            self._recorded[key] = mx.compile(step, inputs=[self._module.state])
        cache.make_room()
        buffers, cache.buffers = cache.buffers, []  # no reference is left here, so that they can be written in place
        position = mx.array([cache.length])
        signature = key, tuple(part.shape for parts in buffers for part in parts)
        weights = [] if signature in self._signatures else list(_arrays_in(self._module.state))
        try:
            logits, energy, cache.buffers = self._recorded[key](tokens, position, buffers, arrays)
        except Exception:  # it could not be recorded; MLX leaves what it records with in the place of the weights
            for holder, name, weight in weights:
                holder[name] = weight
            cache.buffers = buffers
            raise
        self._signatures.add(signature)
        cache.length += 1
        return logits, energy

    def _step(
        self, law: Law | None, keep: list[int | None], limits: list[int | None]
    ) -> Callable[..., tuple[mx.array, mx.array | None, Buffers]]:
        def step(
            tokens: mx.array, position: mx.array, buffers: Buffers, arrays: list[mx.array]
        ) -> tuple[mx.array, mx.array | None, Buffers]:
            given = iter(arrays)
            placed = law.to(lambda _: next(given), mx.addmm) if law is not None else None
            steering, layers = LawHooks(placed), list(placed.layers) if placed is not None else []
            caches: list[Any] = [
                state_cache(parts) if kept is None else _Slots(parts[0], parts[1], position, kept, limit)
                for parts, kept, limit in zip(buffers, keep, limits, strict=True)
            ]
            energies: list[mx.array] = []

            def hook(k: int, z: mx.array, call: BlockCall) -> mx.array:
                output = steering.block(k, z, call)
                if k == max(layers):
                    energies.append(energy(output[:, -1]))
                return output

            with self._hooks(self._blocks, hook, layers, steering).placed():
                logits = self._module(tokens[:, None], cache=caches)[:, -1]
            held = [
                tuple(cache.cache) if kept is None else (cache.keys, cache.values)
                for cache, kept in zip(caches, keep, strict=True)
            ]
            return logits, energies[0] if energies else None, held

        return step


class _Slots:
    """A layer's buffers as the model sees them in one step: the new token takes its slot."""

    def __init__(self, keys: mx.array, values: mx.array, position: mx.array, keep: int, limit: int | None) -> None:
        self.keys, self.values, self.offset, self._limit = keys, values, position, limit
        size = keys.shape[-2]
        self._slot = mx.where(position < size, position, keep + (position - keep) % (size - keep))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys = mx.slice_update(self.keys, keys.astype(self.keys.dtype), self._slot, axes=(2,))
        self.values = mx.slice_update(self.values, values.astype(self.values.dtype), self._slot, axes=(2,))
        return self.keys, self.values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """(1, slots): those that hold a token which is seen."""
        slots = mx.arange(self.keys.shape[-2])[None]
        if window_size is None or (self._limit is not None and self._limit <= window_size):
            return slots <= self.offset
        if self._limit is not None:  # slots are not in the order of time
            raise ValueError("a window that is shorter than what its cache holds")
        return (slots <= self.offset) & (slots > self.offset - window_size)


def _arrays_in(state: Any) -> Iterator[tuple[Any, Any, mx.array]]:
    """Every array of a module's state, with the dictionary or list that holds it and its name or number there."""
    if isinstance(state, (dict, list, tuple)):
        for name, part in state.items() if isinstance(state, dict) else enumerate(state):
            if isinstance(part, mx.array) and not isinstance(state, tuple):
                yield state, name, part
            yield from _arrays_in(part)


def _grown(part: mx.array, size: int) -> mx.array:
    room = size - part.shape[-2]
    return mx.pad(part, [(0, 0), (0, 0), (0, room), (0, 0)]) if room else part
