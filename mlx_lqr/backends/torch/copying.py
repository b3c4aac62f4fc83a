"""Copies of what a block is called with, and of caches, whatever they are made of.

What was one thing stays one: keys that layers share are shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mlx_lqr.backends.torch.library import is_of_transformers

Path = tuple[int | str, ...]
"""Where something stands among arguments: places in lists and names in dictionaries, from the outside in."""


@dataclass
class Copying:
    """One copy of many things: tensors and caches anew, modules and functions as they are."""

    rows: int = 1
    """What is of one sequence becomes so for this many."""
    written: frozenset[int] | None = None
    """By id, the tensors that are written into, whose numbers are copied for each row; None for all."""
    with_rows: frozenset[Path] = frozenset()
    """The arguments whose first axis is known to grow with the sequences."""
    tensor: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Stands in for every tensor, rather than a copy of it."""
    _done: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    """By id, a thing and its copy; the thing too, or another one could get its id."""

    def copy(self, thing: Any, path: Path = (), *, in_cache: bool = False) -> Any:
        """The copy of a thing that stands at `path`."""
        if id(thing) in self._done:
            return self._done[id(thing)][1]
        copy = thing
        if isinstance(thing, torch.Tensor):
            copy = self._tensor(thing, path, in_cache) if self.tensor is None else self.tensor(thing)
        elif isinstance(thing, (list, tuple)):
            parts = [self.copy(part, (*path, i), in_cache=in_cache) for i, part in enumerate(thing)]
            copy = type(thing)(*parts) if hasattr(thing, "_fields") else type(thing)(parts)
        elif isinstance(thing, dict):
            copy = {name: self.copy(part, (*path, name), in_cache=in_cache) for name, part in thing.items()}
        elif is_of_transformers(thing):
            copy = object.__new__(type(thing))
            self._done[id(thing)] = thing, copy
            copy.__dict__.update({name: self.copy(part, path, in_cache=True) for name, part in vars(thing).items()})
        self._done[id(thing)] = thing, copy
        return copy

    def _tensor(self, tensor: torch.Tensor, path: Path, in_cache: bool) -> torch.Tensor:
        """A tensor of two axes is of one sequence in a cache alone; among arguments it may be a rotation."""
        copy, first = tensor, tensor.shape[0] if tensor.ndim else 0
        grows = path in self.with_rows or (first == 1 and tensor.ndim >= (2 if in_cache else 3))
        if self.rows > 1 and grows:
            repeats = [self.rows, *[1] * (tensor.ndim - 1)]
            copy = tensor.repeat(repeats) if first > 1 else tensor.expand(self.rows, *tensor.shape[1:])
        return copy.clone() if self.written is None or id(tensor) in self.written else copy


def copied(thing: Any, rows: int = 1) -> Any:
    """A copy of a cache that may be spent, of one sequence or as many alike."""
    return Copying(rows).copy(thing)


def tensors_in(thing: Any) -> list[torch.Tensor]:
    """All tensors in arguments or caches, each once."""
    tensors: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        tensors[id(tensor)] = tensor
        return tensor

    Copying(tensor=keep).copy(thing)
    return list(tensors.values())


def first_axes(thing: Any, path: Path = ()) -> dict[Path, int]:
    """The sizes of the first axes of all tensors among arguments, those in caches left out."""
    if isinstance(thing, torch.Tensor):
        return {path: thing.shape[0]} if thing.ndim else {}
    named = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, (list, tuple)) else ()
    return {place: size for name, part in named for place, size in first_axes(part, (*path, name)).items()}
