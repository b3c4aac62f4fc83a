"""What blocks hand on beside the residual stream at one token: keys and values that later layers attend to as well.

The part of such an array that the token itself makes becomes a part of the state, s_k = (z_k, side_k), side_k in R^m.
A block is then a function of s_k, and the blocks are a chain again. What earlier tokens made stays fixed, as does what
is computed before the first block.

Nothing is known of a family. An array belongs to the side if a block returns it, or keeps it in a cache that another
block is called with too, if a later block is called with it, and if it changes when z_k does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lqr.backends.protocol import Float32

Path = tuple[Any, ...]
"""The way to an array among the outputs and arguments of a call."""
Key = Any
"""What an array is known by from call to call: its identity, or that of its cache with its name there."""
Made = Mapping[Path, mx.array]
"""What a call left, for rows of states: arrays (n, ...)."""


@dataclass(frozen=True)
class Slot:
    """An array that one block makes and later ones read, and where it stands in side_k."""

    start: int
    """Its first number in side_k"""
    shape: tuple[int, ...]
    """Of the whole array, for one sequence: (1, ...)"""
    axis: int | None
    """The axis along which the token has a place of its own, or None: all of the array is the token's."""
    index: int
    """The token's place there"""

    @property
    def end(self) -> int:
        """One beyond its last number in side_k."""
        return self.start + prod(self._part)

    @property
    def _part(self) -> tuple[int, ...]:
        return tuple(1 if axis == self.axis else size for axis, size in enumerate(self.shape[1:], 1))

    def taken(self, array: mx.array) -> mx.array:
        """The token's part of an array (n, ...): (n, numbers)"""
        own = [slice(None)] * array.ndim
        if self.axis is not None:
            own[self.axis] = slice(self.index, self.index + 1)
        return array[tuple(own)].reshape(array.shape[0], -1).astype(mx.float32)

    def placed(self, array: mx.array, side: mx.array) -> mx.array:
        """The array (1, ...), for each row of side_k (n, m) with the token's part from there: (n, ...)"""
        part = side[:, self.start : self.end].reshape(side.shape[0], *self._part)
        if self.axis is None:
            return part
        whole = mx.broadcast_to(array.astype(mx.float32), (side.shape[0], *self.shape[1:]))
        before, _, after = mx.split(whole, [self.index, self.index + 1], axis=self.axis)
        return mx.concatenate([before, part, after], axis=self.axis)


@dataclass(frozen=True, eq=False)
class Shared:
    """What one block has to do with the side."""

    size: int = 0
    """m, the same for all blocks of a model"""
    reads: tuple[tuple[mx.array, Slot], ...] = ()
    """Among its frozen arguments"""
    makes: tuple[tuple[Path, Slot], ...] = ()
    passes: tuple[Slot, ...] = ()
    """What was there before it and is needed after it"""

    def replaced(self, side: mx.array) -> list[tuple[mx.array, mx.array]]:
        """The frozen arguments that the side (n, m) stands in for, each with what is put in its place."""
        return [(array, slot.placed(array, side)) for array, slot in self.reads]

    def handed_on(self, side: mx.array, made: Made) -> mx.array:
        """side_{k+1} (n, m); numbers that no later block reads are zero."""
        parts = [(slot.start, side[:, slot.start : slot.end]) for slot in self.passes]
        parts += [(slot.start, slot.taken(made[path])) for path, slot in self.makes]
        row: list[mx.array] = []
        end = 0
        for start, part in [*sorted(parts, key=lambda part: part[0]), (self.size, side[:, :0])]:
            row += [mx.zeros((side.shape[0], start - end)), part]
            end = start + part.shape[1]
        return mx.concatenate(row, axis=1)


@dataclass(frozen=True, eq=False)
class Call:
    """A block's call in a pass of one token."""

    given: Mapping[Key, mx.array]
    """The frozen arguments, as they were before it"""
    left: Mapping[Key, Path]
    """The arrays that later calls may be given: what it returned beside the state, and what its caches hold after it"""


@dataclass(frozen=True)
class _Link:
    source: int
    path: Path
    last: int
    """The last block that reads it"""
    reads: tuple[tuple[int, mx.array], ...]
    axis: int | None
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reads[0][1].shape


def shared_by(calls: Sequence[Call], moved: Callable[[int], Made]) -> tuple[list[Shared], Float32]:
    """What each block has to do with the side, and side_0..side_T (T + 1, m) of this pass.

    Args:
        calls: of the blocks, in order.
        moved: what block k leaves at two states that differ: arrays (2, ...).
    """
    links = _links(calls, moved)
    slots = _placed(links)
    size = max((slot.end for slot in slots), default=0)
    side = np.zeros((len(calls) + 1, size), np.float32)
    if not size:
        return [Shared()] * len(calls), side
    for link, slot in zip(links, slots, strict=True):
        side[link.source + 1 : link.last + 1, slot.start : slot.end] = np.asarray(slot.taken(link.reads[0][1]))
    both = list(zip(links, slots, strict=True))
    return [
        Shared(
            size,
            tuple((array, slot) for link, slot in both for reader, array in link.reads if reader == k),
            tuple((link.path, slot) for link, slot in both if link.source == k),
            tuple(slot for link, slot in both if link.source < k < link.last),
        )
        for k in range(len(calls))
    ], side


def _links(calls: Sequence[Call], moved: Callable[[int], Made]) -> list[_Link]:
    """Every array that one block makes and others read, in the order of its making."""
    changed: dict[int, Made] = {}
    reads: dict[tuple[int, Key], list[tuple[int, mx.array]]] = {}
    for k, call in enumerate(calls):
        for key, array in call.given.items():
            for source in reversed(range(k)):
                if key not in calls[source].left or not _may_be_shared(array):
                    continue
                if source not in changed:
                    changed[source] = moved(source)
                made = changed[source].get(calls[source].left[key])
                if made is not None and made.shape[1:] == array.shape[1:] and _moves(made):
                    reads.setdefault((source, key), []).append((k, array))
                    break
    links = []
    for (source, key), readers in sorted(reads.items(), key=lambda item: item[0][0]):
        path = calls[source].left[key]
        part = _part_that_moves(changed[source][path])
        if part is not None:
            links.append(_Link(source, path, readers[-1][0], tuple(readers), *part))
    return links


def _may_be_shared(array: mx.array) -> bool:
    return array.ndim > 1 and array.shape[0] == 1 and mx.issubdtype(array.dtype, mx.floating)


def _moves(made: mx.array) -> bool:
    return bool(mx.any(made[0] != made[1]).item())


def _part_that_moves(made: mx.array) -> tuple[int | None, int] | None:
    """The axis and the index of the token's part of an array, by how it differs between two states (2, ...).

    None if it is neither one place along one axis nor the whole array.
    """
    differs = np.asarray(made[0] != made[1])
    single: list[tuple[int, int]] = []
    for axis, size in enumerate(differs.shape):
        where = np.flatnonzero(differs.any(axis=tuple(other for other in range(differs.ndim) if other != axis)))
        if size > 1 and len(where) == 1:
            single.append((axis + 1, int(where[0])))
    if len(single) > 1:
        return None
    return single[0] if single else (None, 0)


def _placed(links: Iterable[_Link]) -> list[Slot]:
    """A place for each array, where none is whose time overlaps: what is no longer read makes room."""
    held: list[tuple[_Link, Slot]] = []
    for link in links:
        taken = sorted((slot.start, slot.end) for other, slot in held if other.last > link.source)
        slot = Slot(0, link.shape, link.axis, link.index)
        for start, end in taken:
            if slot.end <= start:
                break
            slot = Slot(max(slot.start, end), link.shape, link.axis, link.index)
        held.append((link, slot))
    return [slot for _, slot in held]
