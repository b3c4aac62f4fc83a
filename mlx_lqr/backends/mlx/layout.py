"""Where the state stands in a model's blocks, found by running a few tokens and not by the names of a family.

Each block takes the state, an array with an axis for the sequences, one for the positions and one or more for the
features, and gives back another, alone or first among other outputs. Hooks see it as (B, L, d), whatever its axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_lqr.backends.hooks import UNSTEERED, BlockCall, Hook, LawHooks
from mlx_lqr.backends.measured import WITHOUT_HEADS
from mlx_lqr.backends.mlx.blocks import ClassHooks
from mlx_lqr.backends.mlx.distributed import Spread
from mlx_lqr.backends.state_place import (
    POSITIONS,
    ROWS,
    TOKENS,
    NoChainError,
    Outputs,
    SeenCall,
    StateArgument,
    place_of_state,
    state_in,
    with_state,
)
from mlx_lqr.errors import InputError


@dataclass(frozen=True)
class Layout(StateArgument):
    """How a model calls its blocks."""

    blocks: tuple[nn.Module, ...]
    place: int | str
    rows_axis: int
    """The state's axis of sequences."""
    positions_axis: int
    features: tuple[int, ...]
    """Sizes of the state's other axes, in their order."""
    dtype: mx.Dtype
    """Of the state."""
    vocabulary: int
    hides_tokens: bool
    """Whether the model gives tokens that it never says a logit of minus infinity."""
    spread: Spread | None = None
    """How the blocks are spread over several processes."""

    def finite(self, logits: mx.array) -> mx.array:
        """The logits with a number where a token is hidden, since infinity is what overflow is known by."""
        if not self.hides_tokens:
            return logits
        return mx.where(logits == -mx.inf, mx.finfo(logits.dtype).min, logits)

    @property
    def width(self) -> int:
        return prod(self.features)

    @property
    def is_plain(self) -> bool:
        """Whether the state is (B, L, d) in the model itself."""
        return (self.rows_axis, self.positions_axis, len(self.features)) == (0, 1, 1)

    def normal(self, state: mx.array) -> mx.array:
        """The model's own state as (B, L, d)."""
        if self.is_plain:
            return state
        moved = state.transpose(self._order)
        return moved.reshape(*moved.shape[:2], -1)

    def native(self, z: mx.array) -> mx.array:
        """z (B, L, d) as the model's own state."""
        if self.is_plain:
            return z
        order = self._order
        return z.reshape(*z.shape[:2], *self.features).transpose([order.index(axis) for axis in range(len(order))])

    @property
    def _order(self) -> list[int]:
        rest = [i for i in range(len(self.features) + 2) if i not in (self.rows_axis, self.positions_axis)]
        return [self.rows_axis, self.positions_axis, *rest]


class StateHooks(ClassHooks):
    """Hooks that see the state as (B, L, d), wherever it stands and whatever else goes in and out of a block."""

    layout: ClassVar[Layout]

    @classmethod
    def of(cls, layout: Layout) -> type[StateHooks]:
        return type("StateHooks", (cls,), {"layout": layout})

    def __init__(
        self, blocks: Sequence[nn.Module], hook: Hook, layers: Iterable[int], law: LawHooks = UNSTEERED
    ) -> None:
        try:
            super().__init__(blocks, hook, layers, law)
        except AttributeError as error:  # of blocks whose law acts in an attention that they have not
            raise InputError(WITHOUT_HEADS) from error
        self._with_state = {id(block) for block in self.layout.blocks}

    def _place(self, k: int, module: nn.Module, hook: Hook) -> None:
        if id(module) not in self._with_state:  # a part of a block
            super()._place(k, module, hook)
            return
        kind, layout, mine = type(module), self.layout, self._is_mine
        if (k, kind) not in self._classes:

            def call(self: nn.Module, *args: Any, **kwargs: Any) -> Outputs:
                if not mine():
                    return kind.__call__(self, *args, **kwargs)
                outputs: list[tuple[mx.array, Outputs]] = []

                def block(z: mx.array, *args: Any, **kwargs: Any) -> mx.array:
                    exchanged, named = layout.exchanged(args, kwargs, layout.native(z))
                    own = kind.__call__(self, *exchanged, **named)
                    outputs.append((layout.normal(state_in(own)), own))
                    return outputs[-1][0]

                given = layout.state_of(args, kwargs)
                if layout.spread is not None:
                    given = layout.spread.given(self, given)
                result = hook(k, layout.normal(given), BlockCall(block, args, kwargs))
                state, own = outputs[-1]
                return own if result is state else with_state(own, layout.native(result))

            self._classes[k, kind] = type(kind.__name__, (kind,), {"__call__": call, "is_hooked": True})
        object.__setattr__(module, "__class__", self._classes[k, kind])


def layout_of(module: nn.Module, caches: Callable[[], Sequence[Any]], spread: Spread | None = None) -> Layout:
    """Run a few tokens and look how the blocks are called.

    Args:
        module: a language model of mlx-lm.
        caches: makes the caches of a new decode.
        spread: over which processes, if over several.

    Raises:
        NoChainError: the blocks do not pass on one state, each once.
    """
    blocks = blocks_of(module)
    for block in blocks:
        ClassHooks.refuse(block)
    calls: list[SeenCall] = []
    new = caches()
    with watched(blocks, lambda *call: calls.append(SeenCall(*call))):
        logits = module(mx.array(TOKENS), cache=new)
        mx.eval(logits)
    if [call.block for call in calls] != list(range(len(blocks))):
        raise NoChainError(
            f"in one pass it calls its {len(blocks)} blocks {len(calls)} times, and not each once in order"
        )
    for store in _stores_beside(calls, new):
        raise NoChainError(f"its blocks hand on a {store} beside one state")
    place = place_of_state(calls, _is_floating)
    state = calls[0].argument(place)
    rows_axis = state.shape.index(ROWS)
    positions_axis = state.shape.index(POSITIONS)
    features = tuple(size for axis, size in enumerate(state.shape) if axis not in (rows_axis, positions_axis))
    dtype = state_in(calls[-1].outputs).dtype
    hides = bool(mx.any(logits == -mx.inf).item())
    vocabulary = int(logits.shape[-1])
    return Layout(tuple(blocks), place, rows_axis, positions_axis, features, dtype, vocabulary, hides, spread)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """A model's blocks, in order.

    Raises:
        NoChainError: there is no list of them.
    """
    blocks = list(getattr(module, "layers", None) or _longest_list(module))
    if len(blocks) < 2 or not all(isinstance(block, nn.Module) for block in blocks):
        raise NoChainError("it has no list of blocks")
    if len({id(block) for block in blocks}) < len(blocks):
        raise NoChainError("it runs the same block more than once")
    return blocks


def _longest_list(module: nn.Module) -> list[nn.Module]:
    lists = [
        part
        for owner in module.modules()
        for part in owner.children().values()
        if isinstance(part, list) and all(isinstance(block, nn.Module) for block in part)
    ]
    return max(lists, key=len, default=[])


def _stores_beside(calls: Sequence[SeenCall], caches: Sequence[Any]) -> Iterator[str]:
    """Kinds of what blocks are called with that keeps something of every token and is no cache."""
    known = {id(part) for cache in caches for part in (cache, *getattr(cache, "caches", ()))}
    for call in calls:
        for thing in (*call.args, *call.kwargs.values()):
            if isinstance(thing, (mx.array, nn.Module)) or id(thing) in known:
                continue
            kept = getattr(thing, "__dict__", {}).values()
            if any(isinstance(part, mx.array) and {ROWS, POSITIONS} <= set(part.shape) for part in kept):
                yield type(thing).__name__


def _is_floating(thing: Any) -> bool:
    return isinstance(thing, mx.array) and mx.issubdtype(thing.dtype, mx.floating)


@contextmanager
def watched(blocks: Sequence[nn.Module], watch: Callable[..., Any]) -> Iterator[None]:
    """Inside this context, watch(k, args, kwargs, outputs) hears of every call of block k."""
    kinds = [type(block) for block in blocks]

    def watching(k: int, kind: type[nn.Module]) -> type[nn.Module]:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Outputs:
            outputs = kind.__call__(self, *args, **kwargs)
            watch(k, args, kwargs, outputs)
            return outputs

        return type(kind.__name__, (kind,), {"__call__": call})

    try:
        for k, (block, kind) in enumerate(zip(blocks, kinds, strict=True)):
            object.__setattr__(block, "__class__", watching(k, kind))
        yield
    finally:
        for block, kind in zip(blocks, kinds, strict=True):
            object.__setattr__(block, "__class__", kind)
