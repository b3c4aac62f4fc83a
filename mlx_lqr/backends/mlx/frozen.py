"""A block as a function of the state at one token, everything else that it is called with frozen.

Its arguments are kept as they are just before the call: caches of any kind, masks, keys shared between layers. Each
evaluation takes copies of them. n states are n sequences of a batch, so that one reverse pass gives A' w for n rows w,
and n rows w = e_i give the Jacobian. Where a block has no derivative, central differences in float32 take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_lqr.backends.hooks import BlockCall
from mlx_lqr.backends.mlx.blocks import TANGENTS
from mlx_lqr.backends.mlx.layout import Layout, StateHooks, state_in
from mlx_lqr.backends.protocol import Float32

STEP = 1e-2
"""Of differences, times |z| / sqrt(d): rounding and curvature cost about 1e-3 each."""
COPIED_BYTES = 1 << 28
"""How much may be copied for the rows of one evaluation."""


@dataclass(frozen=True, eq=False)
class FrozenBlock:
    """The block at one token."""

    block: nn.Module
    layout: Layout
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    differences: bool
    """Whether the block has no derivative that is right."""

    @classmethod
    def at(cls, block: nn.Module, layout: Layout, call: Any, *, differences: bool) -> FrozenBlock:
        """What the model is about to call; `call` has its `args` and `kwargs`, which only its owner needs."""
        if layout.spread is not None and not layout.spread.runs(block):
            return cls(block, layout, (), {}, differences)
        args, kwargs = copied(layout.exchanged(call.args, call.kwargs, None))
        return cls(block, layout, args, kwargs, differences)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in arrays_in((self.args, self.kwargs)))

    def values(self, z: Float32) -> Float32:
        """phi(z) of rows z (n, d): (n, d)"""
        return self._where_it_is(lambda: self._values(z), z.shape)

    def vjp(self, z: Float32, cotangents: Float32) -> Float32:
        """A' w at z (d,) for rows w (n, d): (n, d)"""
        return self._where_it_is(lambda: self._vjp(z, cotangents), cotangents.shape)

    def jvp(self, z: Float32, tangents: Float32) -> Float32:
        """A w at z (d,) for rows w (n, d): (n, d). A derivative of w -> A' w, which is linear."""
        return self._where_it_is(lambda: self._jvp(z, tangents), tangents.shape)

    def jacobian(self, z: Float32) -> Float32:
        """A at z (d,): (d, d)"""
        return self._where_it_is(lambda: self._jacobian(z), (z.size, z.size))

    def _where_it_is(self, compute: Callable[[], Float32], shape: tuple[int, ...]) -> Float32:
        spread = self.layout.spread
        return compute() if spread is None else spread.of_owner(self.block, compute, shape)

    def _values(self, z: Float32) -> Float32:
        with in_float32(self.block):
            return self._in_chunks(lambda rows: self._run(mx.array(rows)), z)

    def _vjp(self, z: Float32, cotangents: Float32) -> Float32:
        if self.differences:
            return cotangents @ self._jacobian(z)
        with in_float32(self.block):
            return self._in_chunks(lambda rows: self._pulled_back(z, mx.array(rows)), cotangents)

    def _jvp(self, z: Float32, tangents: Float32) -> Float32:
        if self.differences or not self._has_second_derivative(z):
            return self._differences(z, tangents)
        with in_float32(self.block):
            return self._in_chunks(lambda rows: self._pushed_forward(z, mx.array(rows)), tangents)

    def _jacobian(self, z: Float32) -> Float32:
        identity = np.eye(z.size, dtype=np.float32)
        return self._differences(z, identity).T if self.differences else self._vjp(z, identity)

    def _run(self, rows: mx.array) -> mx.array:
        count = rows.shape[0]
        args, kwargs = copied((self.args, self.kwargs), count, self.layout.rows_axis, mx.float32)
        args, kwargs = self.layout.exchanged(args, kwargs, self.layout.native(rows[:, None]))
        return self.layout.normal(state_in(self.block(*args, **kwargs)))[:, 0]

    def _pulled_back(self, z: Float32, cotangents: mx.array) -> mx.array:
        states = mx.broadcast_to(mx.array(z), cotangents.shape)
        gradient: mx.array = mx.vjp(self._run, [states], [cotangents])[1][0]
        return gradient

    def _pushed_forward(self, z: Float32, tangents: mx.array) -> mx.array:
        return mx.vjp(lambda w: self._pulled_back(z, w), [mx.zeros_like(tangents)], [tangents])[1][0]

    def _has_second_derivative(self, z: Float32) -> bool:
        if self.layout.spread is not None and not self.layout.spread.has_second_derivative:
            return False
        try:
            with in_float32(self.block):
                mx.eval(self._pushed_forward(z, mx.ones((1, z.size))))
        except (ValueError, RuntimeError, NotImplementedError):
            return False
        return True

    def _differences(self, z: Float32, tangents: Float32) -> Float32:
        """A w by central differences, each w at the length that STEP says: (n, d)"""
        length = np.linalg.norm(tangents, axis=1, keepdims=True)
        step = STEP * np.linalg.norm(z) / z.size**0.5 / np.where(length > 0, length, 1)
        moved = (step * tangents).astype(np.float32)
        ahead, behind = self._values(z + moved), self._values(z - moved)
        return ((ahead - behind) / (2 * step)).astype(np.float32)

    def _in_chunks(self, function: Callable[[Float32], mx.array], rows: Float32) -> Float32:
        size = max(1, min(TANGENTS, COPIED_BYTES // max(1, self.nbytes)))
        rows = np.ascontiguousarray(rows, np.float32)
        parts = [np.asarray(function(rows[start : start + size])) for start in range(0, len(rows), size)]
        return np.concatenate(parts) if parts else np.empty(rows.shape, np.float32)


def copied(thing: Any, rows: int = 1, axis: int = 0, dtype: mx.Dtype | None = None) -> Any:
    """A copy of a call's arguments that may be spent: arrays and caches anew, modules and functions as they are.

    Args:
        rows: what is of one sequence becomes so for this many.
        axis: the state's axis of sequences.
        dtype: of all floating numbers; None leaves them.
    """
    return _Copying(rows, axis, dtype).copy(thing, in_cache=False)


class _Copying:
    """One copy of many things; see `copied`. What was one thing stays one: keys that layers share are shared."""

    def __init__(self, rows: int, axis: int, dtype: mx.Dtype | None) -> None:
        self._rows, self._axis, self._dtype = rows, axis, dtype
        self._done: dict[int, tuple[Any, Any]] = {}
        """By id, a thing and its copy; the thing too, or another one could get its id."""

    def copy(self, thing: Any, *, in_cache: bool) -> Any:
        def again(part: Any) -> Any:
            return self.copy(part, in_cache=in_cache)

        if id(thing) in self._done:
            return self._done[id(thing)][1]
        copy = thing
        if isinstance(thing, mx.array):
            copy = self._array(thing, in_cache)
        elif isinstance(thing, tuple) and hasattr(thing, "_fields"):
            copy = type(thing)(*map(again, thing))
        elif isinstance(thing, (list, tuple)):
            copy = type(thing)(map(again, thing))
        elif isinstance(thing, dict) and not isinstance(thing, nn.Module):
            copy = {name: again(part) for name, part in thing.items()}
        elif _is_cache(thing):
            copy = object.__new__(type(thing))
            self._done[id(thing)] = thing, copy
            for name, part in _trimmed(thing).items():
                copy.__dict__[name] = self.copy(part, in_cache=True)
        self._done[id(thing)] = thing, copy
        return copy

    def _array(self, array: mx.array, in_cache: bool) -> mx.array:
        """A handle of its own, since assignments to slices change an array in place.

        An array of two axes is of one sequence in a cache alone; among arguments it may be a mask.
        """
        rows, axis, shape = self._rows, self._axis, array.shape
        cast = self._dtype is not None and mx.issubdtype(array.dtype, mx.floating)
        copy = array.astype(self._dtype) if cast else mx.array(array)
        if rows > 1 and array.ndim >= (2 if in_cache else 3) and shape[0] == 1:
            return mx.broadcast_to(copy, (rows, *shape[1:]))
        if rows > 1 and axis > 0 and array.ndim > max(axis, 3) and shape[axis] == 1:
            return mx.broadcast_to(copy, (*shape[:axis], rows, *shape[axis + 1 :]))
        return copy


def _is_cache(thing: Any) -> bool:
    kind = type(thing)
    return hasattr(thing, "__dict__") and not isinstance(thing, (nn.Module, type)) and _of_mlx_lm(kind)


def _of_mlx_lm(kind: type) -> bool:
    return kind.__module__.startswith("mlx_lm.models.")


def _trimmed(cache: Any) -> dict[str, Any]:
    """What a cache holds. Buffers with room for many more tokens, one for each row, would fill the memory."""
    held = dict(vars(cache))
    keys, length = held.get("keys"), held.get("offset")
    if type(cache).__name__ not in ("KVCache", "RotatingKVCache") or not isinstance(keys, mx.array):
        return held
    if isinstance(length, int) and length < keys.shape[-2]:
        held |= {name: held[name][..., :length, :] for name in ("keys", "values")}
    return held | {"step": 1}


def arrays_in(thing: Any) -> Iterator[mx.array]:
    """All arrays in arguments or caches."""
    if isinstance(thing, mx.array):
        yield thing
    elif isinstance(thing, nn.Module):
        return
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from arrays_in(part)
    elif isinstance(thing, dict):
        for part in thing.values():
            yield from arrays_in(part)
    elif _is_cache(thing):
        yield from arrays_in(vars(thing))


def _is_narrow(weight: Any) -> bool:
    """Whether it is an array of 16-bit numbers; some of mlx-lm's modules keep plain numbers among their parameters."""
    return isinstance(weight, mx.array) and mx.issubdtype(weight.dtype, mx.floating) and weight.dtype != mx.float32


@contextmanager
def in_float32(block: nn.Module, *, differentiable: bool = True) -> Iterator[None]:
    """The block with all floating numbers in float32; afterwards as it was. Packed weights stay packed.

    Args:
        differentiable: in training mode too, in which gated-delta blocks keep to operations that have a derivative.
    """
    parameters, was_training = block.parameters(), block.training
    narrow = any(_is_narrow(weight) for _, weight in tree_flatten(parameters))
    try:
        if narrow:
            block.update(tree_map(lambda a: a.astype(mx.float32) if _is_narrow(a) else a, parameters))
        if differentiable:
            block.train()
            for part in block.modules():
                if isinstance(part, nn.Dropout):
                    part.eval()
        yield
    finally:
        if narrow:
            block.update(parameters)
        if differentiable:
            block.train(was_training)


def frozen_at(
    module: nn.Module, layout: Layout, caches: Any, token: int, *, differences: bool, float32: bool = False
) -> tuple[Float32, list[FrozenBlock]]:
    """z_0..z_T (T + 1, d) at a token after what `caches` hold of one sequence, and the blocks there.

    Args:
        caches: are left as they are.
        differences: see `FrozenBlock`.
        float32: whether every block is run in float32.
    """
    blocks: list[FrozenBlock] = []
    residual: list[mx.array] = []

    def keep(k: int, z: mx.array, call: BlockCall) -> mx.array:
        block = layout.blocks[k]
        blocks.append(FrozenBlock.at(block, layout, call, differences=differences))
        residual.append(z[0, -1])
        output = in_full(block, z, call) if float32 else call(z)
        if k == len(layout.blocks) - 1:
            residual.append(output[0, -1])
        return output

    with StateHooks.of(layout)(layout.blocks, keep, range(len(layout.blocks))).placed():
        module(mx.array([[token]]), cache=copied(caches))
    stacked = mx.stack([z.astype(mx.float32) for z in residual])
    mx.eval(stacked, list(arrays_in([[block.args, block.kwargs] for block in blocks])))
    states = np.asarray(stacked)
    return states if layout.spread is None else layout.spread.first(states), blocks


def in_full(block: nn.Module, z: mx.array, call: BlockCall) -> mx.array:
    """A block's output in float32, computed while its weights are, so that a single block's are in memory."""
    with in_float32(block, differentiable=False):
        output = call(z.astype(mx.float32))
        mx.eval(output, list(arrays_in((call.args, call.kwargs))))
    return output
