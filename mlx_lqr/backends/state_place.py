"""Where the state stands in the calls of a model's blocks, seen by running a few tokens, whatever the framework."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mlx_lqr.backends.protocol import Array
from mlx_lqr.errors import InputError

ROWS, POSITIONS = 5, 7
"""Of the tokens that are run; sizes that no model's features have, so that each axis is known by its size."""
TOKENS = [[1 + (i + j) % 6 for j in range(POSITIONS)] for i in range(ROWS)]
Outputs = Any
"""What a block returns: the state, or a tuple or list with the state in it."""


class NoChainError(InputError):
    """The model is no chain of blocks with one state; the message is the reason, without the model's name."""


@dataclass(frozen=True)
class SeenCall:
    """A block's call."""

    block: Any
    """The block, or its number"""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Outputs

    def argument(self, place: int | str) -> Any:
        """What stands at a position, or under a name; None where nothing does."""
        if isinstance(place, str):
            return self.kwargs.get(place)
        return self.args[place] if place < len(self.args) else None


class StateArgument:
    """What has a `place`, the state's position among a block's arguments or its name, can take it from there."""

    place: int | str

    def state_of(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Array:
        """The state among the arguments of a call."""
        return kwargs[self.place] if isinstance(self.place, str) else args[self.place]

    def exchanged(
        self, args: Sequence[Any], kwargs: dict[str, Any], state: Array | None
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a call with another state."""
        if isinstance(self.place, str):
            return list(args), {**kwargs, self.place: state}
        return [*args[: self.place], state, *args[self.place + 1 :]], kwargs


def state_in(outputs: Outputs) -> Array:
    """The state in what a block returned."""
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def with_state(outputs: Outputs, state: Array) -> Outputs:
    """What a block returned, with another state."""
    if isinstance(outputs, (tuple, list)):
        return type(outputs)([state, *outputs[1:]])
    return state


def place_of_state(calls: Sequence[SeenCall], is_floating: Callable[[Any], bool]) -> int | str:
    """Where every block has an array like the one that it returns; of several, the one that the block before made.

    Args:
        calls: of all blocks in order, with `TOKENS`.
        is_floating: whether something is an array of floating numbers.

    Raises:
        NoChainError: blocks do not take and return one such array.
    """
    for call in calls:
        outputs = call.outputs
        first: Any = next(iter(outputs), None) if isinstance(outputs, (tuple, list)) else outputs
        if not is_floating(first) or not {ROWS, POSITIONS} <= set(first.shape):
            raise NoChainError("its blocks do not return one state")

    def is_like_output(call: SeenCall, place: int | str) -> bool:
        argument = call.argument(place)
        return is_floating(argument) and argument.shape == state_in(call.outputs).shape

    places: list[int | str] = [*range(len(calls[0].args)), *calls[0].kwargs]
    alike = [place for place in places if all(is_like_output(call, place) for call in calls)]
    if not alike:
        raise NoChainError("its blocks do not take one state of the shape that they return")
    handed_on = [
        place
        for place in alike
        if any(call.argument(place) is state_in(before.outputs) for before, call in pairwise(calls))
    ]
    return (handed_on or alike)[0]
