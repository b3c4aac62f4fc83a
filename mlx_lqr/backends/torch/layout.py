"""Where the state stands in a model's blocks, found by running a few tokens and not by the names of a family.

Each block takes the state, a tensor with an axis for the sequences, one for the positions and one or more for the
features, and gives back another, alone or first among other outputs. Hooks see it as (B, L, d), whatever its axes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import nn

from mlx_lqr.backends.hooks import UNSTEERED, BlockCall, Hook, LawHooks
from mlx_lqr.backends.measured import WITHOUT_HEADS
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
from mlx_lqr.backends.torch.blocks import ForwardHooks
from mlx_lqr.backends.torch.copying import Path, first_axes
from mlx_lqr.errors import InputError


@dataclass(frozen=True)
class Layout(StateArgument):
    """How a model is called, and how it calls its blocks."""

    blocks: tuple[nn.Module, ...]
    body: nn.Module
    """What every call of the model goes through: the model without its head where it is called as one, or the model."""
    place: int | str
    axes: tuple[int, int]
    """The state's axes of sequences and of positions."""
    features: tuple[int, ...]
    """Sizes of the state's other axes, in their order."""
    with_rows: tuple[frozenset[Path], ...]
    """Of each block, the arguments whose first axis grows with the sequences."""
    dtype: torch.dtype
    """Of the state."""
    vocabulary: int
    hides_tokens: bool
    """Whether the model gives tokens that it never says a logit of minus infinity."""
    cache: str
    """The name under which the model takes and returns what it keeps of the tokens before."""
    keeps_last: bool
    """Whether the model can be asked for the last position's logits alone."""

    @property
    def width(self) -> int:
        return prod(self.features)

    def call(self, module: Any, tokens: torch.Tensor, cache: Any, *, last: bool = False) -> tuple[torch.Tensor, Any]:
        """The model's logits of tokens (B, L), finite where it hides tokens, and its cache with them in it.

        Args:
            cache: what the call before returned; it may be changed. None for nothing.
            last: ask for the last position's logits (B, 1, V) where the model can do that.
        """
        options = {} if cache is None else {self.cache: cache}
        if last and self.keeps_last:
            options["logits_to_keep"] = 1
        outputs = module(input_ids=tokens, use_cache=True, return_dict=True, **options)
        logits: torch.Tensor = outputs.logits
        if self.hides_tokens:  # since infinity is what overflow is known by
            logits = logits.masked_fill(logits == -torch.inf, torch.finfo(logits.dtype).min)
        return logits, outputs[self.cache]

    def normal(self, state: torch.Tensor) -> torch.Tensor:
        """The model's own state as (B, L, d)."""
        return state if self._is_plain else state.movedim(self.axes, (0, 1)).flatten(2)

    def native(self, z: torch.Tensor) -> torch.Tensor:
        """z (B, L, d) as the model's own state."""
        return z if self._is_plain else z.unflatten(2, self.features).movedim((0, 1), self.axes)

    @property
    def _is_plain(self) -> bool:
        """Whether the state is (B, L, d) in the model itself."""
        return self.axes == (0, 1) and len(self.features) == 1


class StateHooks(ForwardHooks):
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

    def _through(self, k: int, module: nn.Module, hook: Hook) -> Callable[..., Any]:
        layout = self.layout
        if not any(module is block for block in layout.blocks):  # a part of a block
            return super()._through(k, module, hook)
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Outputs:
            if not self._is_mine():
                return original(*args, **kwargs)
            outputs: list[tuple[torch.Tensor, Outputs]] = []

            def block(z: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                given, named = layout.exchanged(args, kwargs, layout.native(z))
                own = original(*given, **named)
                outputs.append((layout.normal(state_in(own)), own))
                return outputs[-1][0]

            result = hook(k, layout.normal(layout.state_of(args, kwargs)), BlockCall(block, args, kwargs))
            state, own = outputs[-1]
            return own if result is state else with_state(own, layout.native(result))

        return forward


def layout_of(module: Any) -> Layout:
    """Run a few tokens and look how the blocks are called.

    Args:
        module: a transformers model for causal language modelling.

    Raises:
        NoChainError: the blocks do not pass on one state, each once, or the model does not decode with a cache.
    """
    lists = _lists_of(module)
    every = [block for blocks in lists for block in blocks]
    tokens = torch.tensor(TOKENS, device=module.device)
    with _watched(every) as single:
        alone = module(input_ids=tokens[:1], use_cache=True, return_dict=True)
    with _watched([*every, module.base_model]) as calls:
        outputs = module(input_ids=tokens, use_cache=True, return_dict=True)
    body = module.base_model if any(call.block is module.base_model for call in calls) else module
    blocks, calls = _chain(lists, calls)
    place = place_of_state(calls, _is_floating)
    state, logits = calls[0].argument(place), outputs.logits
    axes = state.shape.index(ROWS), state.shape.index(POSITIONS)
    parameters = inspect.signature(module.forward).parameters
    caches = [name for name in outputs if name in parameters and not isinstance(outputs[name], torch.Tensor)]
    if not caches:
        raise NoChainError("it keeps nothing of the tokens that it has read, and so cannot go on from them")
    module(input_ids=tokens[:1, :1], use_cache=True, return_dict=True, **{caches[0]: alone[caches[0]]})
    return Layout(
        blocks=tuple(blocks),
        body=body,
        place=place,
        axes=axes,
        features=tuple(size for axis, size in enumerate(state.shape) if axis not in axes),
        with_rows=tuple(map(_with_rows, _chain([blocks], single)[1], calls)),
        dtype=state_in(calls[-1].outputs).dtype,
        vocabulary=int(logits.shape[-1]),
        hides_tokens=bool((logits == -torch.inf).any()),
        cache=caches[0],
        keeps_last="logits_to_keep" in parameters,
    )


def _with_rows(single: SeenCall, call: SeenCall) -> frozenset[Path]:
    """The arguments whose first axis is `ROWS` times what it is in a call of one sequence."""
    before, after = first_axes([single.args, single.kwargs]), first_axes([call.args, call.kwargs])
    return frozenset(path for path, size in before.items() if after.get(path) == ROWS * size)


def _lists_of(module: nn.Module) -> list[list[nn.Module]]:
    """All lists of modules that may be the blocks, those within blocks left out: the longest first."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part) > 1]
    inner = {id(part) for outer in lists for block in outer for part in block.modules()}
    outermost = [list(part) for part in lists if id(part) not in inner]
    if not outermost:
        raise NoChainError("it has no list of blocks")
    return sorted(outermost, key=len, reverse=True)


def _chain(lists: Sequence[list[nn.Module]], calls: Sequence[SeenCall]) -> tuple[list[nn.Module], list[SeenCall]]:
    """The longest list of blocks that text goes through, and their calls."""
    for blocks in lists:
        numbers = {id(block): k for k, block in enumerate(blocks)}
        own = [call for call in calls if id(call.block) in numbers]
        if not own:  # of images, or of sound
            continue
        if len(numbers) < len(blocks):
            raise NoChainError("it runs the same block more than once")
        if [numbers[id(call.block)] for call in own] != list(range(len(blocks))):
            raise NoChainError(
                f"in one pass it calls its {len(blocks)} blocks {len(own)} times, and not each once in order"
            )
        return blocks, own
    raise NoChainError("it has no list of blocks that text goes through")


def _is_floating(thing: Any) -> bool:
    return isinstance(thing, torch.Tensor) and thing.is_floating_point()


@contextmanager
def _watched(blocks: Sequence[nn.Module]) -> Iterator[list[SeenCall]]:
    """Inside this context, the list gets every call of one of the blocks."""
    calls: list[SeenCall] = []

    def watch(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Outputs) -> None:
        calls.append(SeenCall(block, args, kwargs, outputs))

    handles = [block.register_forward_hook(watch, with_kwargs=True) for block in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
