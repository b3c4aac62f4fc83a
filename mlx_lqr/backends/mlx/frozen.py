"""A block as a function of the state at one token, everything else that it is called with frozen.

Its arguments are kept as they are just before the call: caches of any kind, masks. Each evaluation takes copies of
them. n states are n sequences of a batch, so that one reverse pass gives A' w for n rows w, and n rows w = e_i give the
Jacobian. Where a block has no derivative, central differences in float32 take its place.

The state is s_k = (z_k, side_k) in R^(d + m): the residual stream, and what blocks hand on beside it (shared.py). For
most models m = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_lqr.backends.hooks import BlockCall
from mlx_lqr.backends.mlx.blocks import TANGENTS
from mlx_lqr.backends.mlx.copying import arrays_in, copied, places_in
from mlx_lqr.backends.mlx.layout import Layout, StateHooks, watched
from mlx_lqr.backends.mlx.shared import Call, Made, Shared, shared_by
from mlx_lqr.backends.protocol import Float32
from mlx_lqr.backends.state_place import Outputs, state_in

STEP = 1e-2
"""Of differences, times |z| / sqrt(d): rounding and curvature cost about 1e-3 each."""
APART = 0.1
"""How far apart two states are by which it is seen what depends on the state, times |z| / sqrt(d)."""
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
    shared: Shared = field(default_factory=Shared)

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

    def values(self, s: Float32) -> Float32:
        """phi(s) of rows s (n, d + m): (n, d + m)"""
        return self._where_it_is(lambda: self._values(s), s.shape)

    def vjp(self, s: Float32, cotangents: Float32) -> Float32:
        """A' w at s (d + m,) for rows w (n, d + m): (n, d + m)"""
        return self._where_it_is(lambda: self._vjp(s, cotangents), cotangents.shape)

    def jvp(self, s: Float32, tangents: Float32) -> Float32:
        """A w at s (d + m,) for rows w (n, d + m): (n, d + m). A derivative of w -> A' w, which is linear."""
        return self._where_it_is(lambda: self._jvp(s, tangents), tangents.shape)

    def jacobian(self, s: Float32) -> Float32:
        """A at s (d + m,): (d + m, d + m)"""
        return self._where_it_is(lambda: self._jacobian(s), (s.size, s.size))

    def moved(self, z: Float32) -> Made:
        """What the block leaves at z (d,) and at a state near it: arrays (2, ...)."""
        apart = np.random.default_rng(0).standard_normal(z.size) * APART * np.linalg.norm(z) / z.size**0.5
        with in_float32(self.block):
            _, made = self._called(mx.array(np.stack([z, z + apart]).astype(np.float32)))
            mx.eval(list(made.values()))
        return made

    def _where_it_is(self, compute: Callable[[], Float32], shape: tuple[int, ...]) -> Float32:
        spread = self.layout.spread
        return compute() if spread is None else spread.of_owner(self.block, compute, shape)

    def _values(self, s: Float32) -> Float32:
        with in_float32(self.block):
            return self._in_chunks(lambda rows: self._run(mx.array(rows)), s)

    def _vjp(self, s: Float32, cotangents: Float32) -> Float32:
        if self.differences:
            return cotangents @ self._jacobian(s)
        with in_float32(self.block):
            return self._in_chunks(lambda rows: self._pulled_back(s, mx.array(rows)), cotangents)

    def _jvp(self, s: Float32, tangents: Float32) -> Float32:
        if self.differences or not self._has_second_derivative(s):
            return self._differences(s, tangents)
        with in_float32(self.block):
            return self._in_chunks(lambda rows: self._pushed_forward(s, mx.array(rows)), tangents)

    def _jacobian(self, s: Float32) -> Float32:
        identity = np.eye(s.size, dtype=np.float32)
        return self._differences(s, identity).T if self.differences else self._vjp(s, identity)

    def _run(self, rows: mx.array) -> mx.array:
        if not self.shared.size:
            return self._called(rows)[0]
        z, side = rows[:, : self.layout.width], rows[:, self.layout.width :]
        output, made = self._called(z, self.shared.replaced(side))
        return mx.concatenate([output, self.shared.handed_on(side, made)], axis=1)

    def _called(self, z: mx.array, replaced: Sequence[tuple[mx.array, mx.array]] = ()) -> tuple[mx.array, Made]:
        """The output (n, d) for rows z (n, d), and all that the call left.

        Args:
            replaced: arrays among the arguments, each with what is put in its place, (n, ...).
        """
        args, kwargs = copied((self.args, self.kwargs), z.shape[0], self.layout.rows_axis, mx.float32, replaced)
        args, kwargs = self.layout.exchanged(args, kwargs, self.layout.native(z[:, None]))
        outputs = self.block(*args, **kwargs)
        made = {path: array for path, _, array in places_in(_left(outputs, args, kwargs))}
        return self.layout.normal(state_in(outputs))[:, 0], made

    def _pulled_back(self, s: Float32, cotangents: mx.array) -> mx.array:
        states = mx.broadcast_to(mx.array(s), cotangents.shape)
        gradient: mx.array = mx.vjp(self._run, [states], [cotangents])[1][0]
        return gradient

    def _pushed_forward(self, s: Float32, tangents: mx.array) -> mx.array:
        return mx.vjp(lambda w: self._pulled_back(s, w), [mx.zeros_like(tangents)], [tangents])[1][0]

    def _has_second_derivative(self, s: Float32) -> bool:
        if self.layout.spread is not None and not self.layout.spread.has_second_derivative:
            return False
        try:
            with in_float32(self.block):
                mx.eval(self._pushed_forward(s, mx.ones((1, s.size))))
        except (ValueError, RuntimeError, NotImplementedError):
            return False
        return True

    def _differences(self, s: Float32, tangents: Float32) -> Float32:
        """A w by central differences, each w at the length that STEP says: (n, d + m)"""
        z, relative = s[: self.layout.width], self._relative(s)
        length = np.linalg.norm(tangents / relative, axis=1, keepdims=True)
        step = STEP * np.linalg.norm(z) / z.size**0.5 / np.where(length > 0, length, 1)
        moved = (step * tangents).astype(np.float32)
        ahead, behind = self._values(s + moved), self._values(s - moved)
        return ((ahead - behind) / (2 * step)).astype(np.float32)

    def _relative(self, s: Float32) -> Float32:
        """How large numbers of the state are beside those of z: (d + m,), 1 for z."""
        relative, d = np.ones(s.size, np.float32), self.layout.width
        for _, slot in self.shared.reads:
            part = slice(d + slot.start, d + slot.end)
            relative[part] = np.sqrt(np.mean(s[part] ** 2) / np.mean(s[:d] ** 2)) or 1.0
        return relative

    def _in_chunks(self, function: Callable[[Float32], mx.array], rows: Float32) -> Float32:
        size = max(1, min(TANGENTS, COPIED_BYTES // max(1, self.nbytes)))
        rows = np.ascontiguousarray(rows, np.float32)
        parts = [np.asarray(function(rows[start : start + size])) for start in range(0, len(rows), size)]
        return np.concatenate(parts) if parts else np.empty(rows.shape, np.float32)


def _left(outputs: Outputs, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What there is after a call beside the state, for `places_in`."""
    return [] if isinstance(outputs, mx.array) else list(outputs[1:]), list(args), kwargs


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
    """s_0..s_T (T + 1, d + m) at a token after what `caches` hold of one sequence, and the blocks there.

    Args:
        caches: are left as they are.
        differences: see `FrozenBlock`.
        float32: whether every block is run in float32.
    """
    blocks: list[FrozenBlock] = []
    residual: list[mx.array] = []
    calls = _Calls()

    def keep(k: int, z: mx.array, call: BlockCall) -> mx.array:
        block = layout.blocks[k]
        blocks.append(FrozenBlock.at(block, layout, call, differences=differences))
        calls.begin(call, blocks[-1])
        residual.append(z[0, -1])
        output = in_full(block, z, call) if float32 else call(z)
        if k == len(layout.blocks) - 1:
            residual.append(output[0, -1])
        return output

    hooks = StateHooks.of(layout)
    with watched(layout.blocks, calls.end), hooks(layout.blocks, keep, range(len(layout.blocks))).placed():
        module(mx.array([[token]]), cache=copied(caches))
    stacked = mx.stack([z.astype(mx.float32) for z in residual])
    mx.eval(stacked, list(arrays_in([[block.args, block.kwargs] for block in blocks])))
    state = np.asarray(stacked)
    if layout.spread is not None:  # no process has all that blocks may share
        return layout.spread.first(state), blocks
    shared, side = shared_by(calls.all, lambda k: blocks[k].moved(state[k]))
    if not side.size:
        return state, blocks
    blocks = [replace(block, shared=its) for block, its in zip(blocks, shared, strict=True)]
    return np.concatenate([state, side], axis=1), blocks


class _Calls:
    """What the blocks of one pass are given and leave; see `shared.Call`."""

    def __init__(self) -> None:
        self.all: list[Call] = []
        self._returned: list[Any] = []
        """So that no other array gets the identity of one of these."""

    def begin(self, call: BlockCall, block: FrozenBlock) -> None:
        frozen = {path: array for path, _, array in places_in((block.args, block.kwargs))}
        before = places_in((call.args, call.kwargs))
        self._given = {key: frozen[path] for path, key, _ in before if path in frozen}

    def end(self, k: int, args: Sequence[Any], kwargs: dict[str, Any], outputs: Outputs) -> None:
        left = {}
        for path, key, _ in places_in(_left(outputs, args, kwargs)):
            returned, in_cache = path[0] == 0, isinstance(key, tuple)
            if in_cache or (returned and key not in self._given):
                left[key] = path
        self._returned.append(outputs)
        self.all.append(Call(self._given, left))


def in_full(block: nn.Module, z: mx.array, call: BlockCall) -> mx.array:
    """A block's output in float32, computed while its weights are, so that a single block's are in memory."""
    with in_float32(block, differentiable=False):
        output = call(z.astype(mx.float32))
        mx.eval(output, list(arrays_in((call.args, call.kwargs))))
    return output
