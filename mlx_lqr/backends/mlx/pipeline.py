"""Every process of a group with some of a model's blocks.

The model runs as it is on all of them. In the place of a block that is elsewhere stands one without weights, which
takes over the state from its owner; states are handed on by a sum over the group to which all but the owner give zeros.
A block's cache is where the block is. Elsewhere the model sees another of its kind, of which it asks how long it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lqr.backends.mlx.library import new_caches
from mlx_lqr.errors import InputError


class Stages:
    """Which process has which block.

    Args:
        blocks: of the whole model.
    """

    def __init__(self, blocks: Sequence[nn.Module], group: mx.distributed.Group) -> None:
        self.owners = _owners(len(blocks), group.size())
        """The rank that has each block; rank 0 has the last ones, as in mlx-lm, and so what comes out of the model."""
        self.everywhere = True
        """Whether all processes get what each block puts out, or only what the first one of a stage is given."""
        self.last: mx.array | None = None
        """The state that was handed on last."""
        self._rank, self._group = group.rank(), group
        self._numbers = {id(block): k for k, block in enumerate(blocks)}
        self._alone = False
        self._given: int | None = None
        """The block that has been given its state already, by a hook that had to see it."""

    def owner(self, block: nn.Module) -> int:
        return self.owners[self._numbers[id(block)]]

    def has(self, k: int) -> bool:
        return self.owners[k] == self._rank

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside this context blocks are called by their owner alone."""
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    def before(self, k: int, state: mx.array) -> mx.array:
        """What block k is given, from what this process has there."""
        given, self._given = self._given, None
        if k == 0 or self.owners[k - 1] == self.owners[k] or k == given or self.everywhere or self._alone:
            return state
        return self._of(k - 1, state)

    def before_hook(self, block: nn.Module, state: mx.array) -> mx.array:
        """As `before`, which will not be asked again."""
        k = self._numbers[id(block)]
        state, self._given = self.before(k, state), k
        return state

    def after(self, k: int, state: mx.array) -> mx.array:
        """What block k puts out, from what this process has there."""
        return self._of(k, state) if self.everywhere and not self._alone else state

    def _of(self, k: int, state: mx.array) -> mx.array:
        """The state that the owner of block k has."""
        own = state if self.has(k) else mx.depends(mx.zeros_like(state), state)  # or it would not wait for its turn
        self.last = mx.distributed.all_sum(own, group=self._group)
        return self.last


def _owners(blocks: int, count: int) -> tuple[int, ...]:
    base, extra = divmod(blocks, count)
    return tuple(rank for rank in reversed(range(count)) for _ in range(base + (rank < extra)))


def place_stages(module: nn.Module, blocks: Sequence[nn.Module], group: mx.distributed.Group) -> Stages:
    """Leave the weights of this process's blocks alone in the module, and let it hand on states.

    Raises:
        InputError: a model that does not come apart into so many.
    """
    if len(blocks) < group.size():
        raise InputError(f"{len(blocks)} blocks are too few for {group.size()} machines: use fewer")
    stages, caches = Stages(blocks, group), new_caches(module)
    kinds = [_kind(cache) for cache in caches]
    if len(kinds) != len(blocks):
        raise InputError("this model has caches that several blocks share: it cannot be a pipeline")
    for rank in range(group.size()):
        if {kind for k, kind in enumerate(kinds) if stages.owners[k] == rank} != set(kinds):
            raise InputError(f"in a pipeline of {group.size()} some have no block of every kind: use fewer machines")
    for k, block in enumerate(blocks):
        _hand_on(k, block, stages)
        if not stages.has(k):
            _drop_weights(block)
    _keep_caches(module, caches, stages)
    return stages


def _kind(cache: Any) -> tuple[Any, ...]:
    """What a cache is, before anything is in it; caches of one kind always say the same of their length."""
    settings = sorted((name, value) for name, value in vars(cache).items() if type(value) in (int, bool, str))
    parts = vars(cache).get("caches", ())
    return (type(cache), *settings, *map(_kind, parts))


def _hand_on(k: int, block: nn.Module, stages: Stages) -> None:
    kind, here = type(block), stages.has(k)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        place = _place(given)
        output = state = given[place] = stages.before(k, given[place])
        if here:
            output = kind.__call__(
                self, *[given[i] for i in range(len(args))], **{name: given[name] for name in kwargs}
            )
        if not isinstance(output, mx.array) or (output.shape, output.dtype) != (state.shape, state.dtype):
            raise InputError(f"the blocks of this model hand on more than one state of one dtype{_NO_PIPELINE}")
        return stages.after(k, output)

    _exchange(block, __call__=call)


_NO_PIPELINE = ": it cannot be a pipeline"


def _place(given: dict[int | str, Any]) -> int | str:
    """Where the state is among a block's arguments: the first array of numbers."""
    for place, argument in given.items():
        if isinstance(argument, mx.array) and mx.issubdtype(argument.dtype, mx.floating):
            return place
    raise InputError(f"the blocks of this model take no state{_NO_PIPELINE}")


def _drop_weights(block: nn.Module) -> None:
    for part in block.modules():
        for name in [name for name, value in part.items() if isinstance(value, mx.array)]:
            del part[name]


def _keep_caches(module: nn.Module, caches: Sequence[Any], stages: Stages) -> None:
    """Let the module make the caches of this process's blocks, and take them."""
    kinds = [_kind(cache) for cache in caches]
    own = [k for k in range(len(kinds)) if stages.has(k)]
    alike = [own.index(k) if k in own else [kinds[i] for i in own].index(kind) for k, kind in enumerate(kinds)]
    kind = type(module)
    make: Callable[[], list[Any]] = getattr(module, "make_cache", lambda: [type(cache)() for cache in caches])

    def make_cache(self: nn.Module) -> list[Any]:
        made = make()
        return [made[k] for k in own]

    def call(self: nn.Module, tokens: mx.array, *args: Any, cache: Any = None, **kwargs: Any) -> mx.array:
        given = None if cache is None else [cache[i] for i in alike]
        logits: mx.array = kind.__call__(self, tokens, *args, cache=given, **kwargs)
        return logits

    _exchange(module, __call__=call, make_cache=make_cache)


def _exchange(part: nn.Module, **methods: Any) -> None:
    """Exchange methods of this one module."""
    kind = type(part)
    own = type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__})
    object.__setattr__(part, "__class__", own)
