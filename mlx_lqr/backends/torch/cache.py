"""The keys and values that a decoding transformers model leaves behind, and the frozen ones of a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mlx_lqr.backends.hooked_decoder import SINKS
from mlx_lqr.backends.torch.attention import seen

GROWTH = 256
"""Tokens for which room is made at once."""


class KeyValueCache:
    """Keys and values of B sequences side by side, padded on their left to one length; a `Layout` of attention.

    Every layer has them in buffers (B, G, S, D) of one layout: slot s holds the token at place `_places[s]`, counted
    from the first column of the padded batch. What a query may see is a matter of the mask alone. Sliding layers hold
    as much as the others.

    Args:
        layers: how many blocks write to it.
        padding: how many columns on the left of each sequence are no tokens.
        window: how many tokens a rolling cache shows; None where it does not roll.
        ahead: how many tokens one pass may bring; a rolling cache keeps that many more, which its first token sees.
    """

    differentiable = False

    def __init__(
        self, layers: int, padding: Sequence[int], device: torch.device, *, window: int | None = None, ahead: int = 1
    ) -> None:
        self.length = 0
        self.capacity = 0
        self.device = device
        self._padded = any(padding)
        self._padding = torch.tensor(list(padding), device=device)
        self._window = window
        self._limit = None if window is None else window + ahead
        self._parts: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        self._places = torch.empty(0, dtype=torch.long, device=device)
        self._masks: dict[int | None, torch.Tensor] = {}

    @property
    def single(self) -> bool:
        return self._padding.numel() == 1

    def make_room(self, count: int) -> bool:
        """Have slots for `count` more tokens; True where the buffers are others than before."""
        needed = self.length + count
        if self._limit is not None:
            needed = min(needed, self._limit)
        if needed <= self.capacity:
            return False
        capacity = max(2 * self.capacity, -(-needed // GROWTH) * GROWTH)
        if self._limit is not None:
            capacity = min(capacity, self._limit)
        more = capacity - self.capacity
        # A slot that was never written to is later than any query, and zero, since 0 times what is not finite is NaN.
        unwritten = torch.full((more,), torch.iinfo(torch.long).max, device=self.device)
        self._places = torch.cat([self._places, unwritten])
        for parts in self._parts:
            parts[:] = [_with_more_slots(part, more) for part in parts]
        self.capacity = capacity
        return True

    def enter(self, at: torch.Tensor, used: int) -> torch.Tensor:
        """Begin a pass of the tokens at places `at` (L,), which looks at the first `used` slots.

        Returns:
            The tokens' positions in their sequences: (B or 1, L).
        """
        self._at, self._used = at, used
        self._slots = at
        if self._limit is not None:
            self._slots = torch.where(at < self._limit, at, SINKS + (at - SINKS) % (self._limit - SINKS))
        self._places.index_copy_(0, self._slots, at)
        self._masks.clear()
        return (at[None] - self._padding[:, None]).clamp_min(0) if self._padded else at[None]

    def slots_after(self, count: int) -> int:
        """How many slots are in use when `count` more tokens are there."""
        return min(self.length + count, self.capacity)

    def mask(self, window: int | None) -> torch.Tensor:
        if window not in self._masks:
            places = self._places[: self._used]
            shorter = window is not None and (self._window is None or window < self._window)
            visible = seen(self._at, places, window if shorter else None)
            if self._window is not None:
                recent = seen(self._at, places, self._window - SINKS)
                visible &= recent | (places < SINKS)
            visible = visible[None, None]
            if self._padded:
                is_token = places[None] >= self._padding[:, None]
                itself = places[None] == self._at[:, None]  # or a query in the padding would see nothing: NaN
                visible = visible & (is_token[:, None, None] | itself)
            self._masks[window] = visible
        return self._masks[window]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's keys and values (B, G, L, D) and return those of all slots in use."""
        parts = self._parts[layer]
        if not parts:
            room = (*keys.shape[:2], self.capacity)
            parts[:] = [keys.new_zeros(*room, keys.shape[-1]), values.new_zeros(*room, values.shape[-1])]
        for part, new in zip(parts, (keys, values), strict=True):
            part.index_copy_(2, self._slots, new)
        return parts[0][:, :, : self._used], parts[1][:, :, : self._used]

    def get_seq_length(self, layer: int = 0) -> int:
        """transformers asks for it."""
        return self.length

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these sequences alone."""
        self._padding = self._padding[rows]
        for parts in self._parts:
            parts[:] = [part[rows] for part in parts]

        self._close_up()

    def join(self, other: KeyValueCache) -> None:
        """Append the sequences of another cache; all end in the same column, so that the shorter are padded."""
        length = max(self.length, other.length)
        capacity = max(self.capacity, other.capacity)
        mine, theirs = self._ending_at(length, capacity), other._ending_at(length, capacity)
        self._parts = [
            [torch.cat(pair) for pair in zip(*parts, strict=True)] for parts in zip(mine, theirs, strict=True)
        ]
        self._padding = torch.cat([self._padding + length - self.length, other._padding + length - other.length])
        self._set_length(length, capacity)

    def of_row(self, row: int) -> KeyValueCache:
        """A copy of what one sequence has."""
        first = int(self._padding[row])
        alone = KeyValueCache(len(self._parts), [0], self.device)
        alone._parts = [
            [part[row : row + 1, :, first : self.length].clone() for part in parts] for parts in self._parts
        ]
        alone._set_length(self.length - first, self.length - first)
        return alone

    def _close_up(self) -> None:
        """Forget the columns that are padding of every sequence."""
        least = int(self._padding.min()) if self._padded else 0
        if least:
            length = self.length - least
            shorter = [[part[:, :, least : self.length] for part in parts] for parts in self._parts]
            self._parts = [[_with_more_slots(part, self.capacity - length) for part in parts] for parts in shorter]
            self._padding = self._padding - least
            self._set_length(length, self.capacity)

    def _ending_at(self, length: int, capacity: int) -> list[list[torch.Tensor]]:
        """The buffers of every layer with so many slots, the last token in column `length` - 1."""
        room = (0, 0, length - self.length, capacity - length)
        return [[torch.nn.functional.pad(part[:, :, : self.length], room) for part in parts] for parts in self._parts]

    def _set_length(self, length: int, capacity: int) -> None:
        """Have the first `length` of so many slots written to; see `make_room` for the others."""
        self.length, self.capacity = length, capacity
        self._padded = bool(self._padding.any())
        self._places = torch.arange(capacity, device=self.device)
        self._places[length:] = torch.iinfo(torch.long).max
        self._masks.clear()

    def rewind(self, length: int) -> bool:
        """Forget all but the first `length` tokens; False where a rolling cache has lost some of them."""
        if self._limit is not None and self.length > self._limit:
            return False
        self.length = length
        return True

    def frozen(self) -> FrozenCache:
        """What one sequence would show the next token, as constants."""
        used = self.slots_after(0)
        parts = [[part[:, :, :used].clone() for part in parts] for parts in self._parts]
        at = torch.tensor([self.length], device=self.device)
        places = torch.cat([self._places[:used], at])
        rolling = None if self._window is None else self._window - SINKS
        return FrozenCache(parts, at, places, rolling)


class FrozenCache:
    """Returns the frozen prefix followed by the new key and value, and stores nothing; a `Layout` of attention.

    It makes a block a pure function of the one new position.
    """

    differentiable = True

    def __init__(
        self, parts: list[list[torch.Tensor]], at: torch.Tensor, places: torch.Tensor, rolling: int | None
    ) -> None:
        self.position = at[None]
        """(1, 1)"""
        self._parts = parts
        self._at, self._places, self._rolling = at, places, rolling

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in self._parts for part in parts)

    def mask(self, window: int | None) -> torch.Tensor:
        shorter = window is not None and (self._rolling is None or window < self._rolling + SINKS)
        visible = seen(self._at, self._places, window if shorter else None)
        if self._rolling is not None:
            visible &= seen(self._at, self._places, self._rolling) | (self._places < SINKS)
        return visible[None, None]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._parts[layer]:
            return keys, values
        before = [part.to(keys.dtype) for part in self._parts[layer]]
        return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)

    def get_seq_length(self, layer: int = 0) -> int:
        """transformers asks for it."""
        return len(self._places) - 1


def _with_more_slots(part: torch.Tensor, more: int) -> torch.Tensor:
    """The buffer (B, G, S, D) with `more` slots of zeros after those it has."""
    return torch.nn.functional.pad(part, (0, 0, 0, more))
