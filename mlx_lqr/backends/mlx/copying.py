"""Copies of what a block is called with, caches of any kind among it, and the arrays in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lqr.backends.mlx.shared import Key, Path


def copied(
    thing: Any,
    rows: int | Sequence[int] = 1,
    axis: int = 0,
    dtype: mx.Dtype | None = None,
    replaced: Sequence[tuple[mx.array, mx.array]] = (),
    *,
    lasting: bool = False,
) -> Any:
    """A copy of a call's arguments that may be spent: arrays and caches anew, modules and functions as they are.

    Args:
        rows: what is of one sequence becomes so for this many; or the sequences to take from caches of several.
        axis: the state's axis of sequences.
        dtype: of all floating numbers; None leaves them.
        replaced: arrays in it, each with what is put in its place.
        lasting: caches keep the room that they have for many more tokens.
    """
    return _Copying(rows, axis, dtype, replaced, lasting).copy(thing, in_cache=False)


class _Copying:
    """One copy of many things; see `copied`. What was one thing stays one: keys that layers share are shared."""

    def __init__(
        self,
        rows: int | Sequence[int],
        axis: int,
        dtype: mx.Dtype | None,
        replaced: Sequence[tuple[mx.array, mx.array]],
        lasting: bool,
    ) -> None:
        self._rows, self._axis, self._dtype, self._lasting = rows, axis, dtype, lasting
        self._done: dict[int, tuple[Any, Any]] = {id(array): (array, other) for array, other in replaced}
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
            for name, part in (vars(thing) if self._lasting else _trimmed(thing)).items():
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
        if not isinstance(rows, int):
            return copy[mx.array(list(rows))] if in_cache and array.ndim >= 2 else copy
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


def places_in(
    thing: Any, path: Path = (), cache: tuple[int, int] | None = None
) -> Iterator[tuple[Path, Key, mx.array]]:
    """All arrays in arguments or caches, each with the way to it and what it is known by.

    Args:
        path: the way to `thing`.
        cache: the identity of the cache that it is in, and the length of the way to that.
    """
    if isinstance(thing, mx.array):
        yield path, id(thing) if cache is None else (cache[0], *path[cache[1] :]), thing
    elif isinstance(thing, (list, tuple)):
        for i, part in enumerate(thing):
            yield from places_in(part, (*path, i), cache)
    elif isinstance(thing, dict) and not isinstance(thing, nn.Module):
        for name, part in thing.items():
            yield from places_in(part, (*path, name), cache)
    elif _is_cache(thing):
        for name, part in _trimmed(thing).items():
            yield from places_in(part, (*path, name), (id(thing), len(path)))
