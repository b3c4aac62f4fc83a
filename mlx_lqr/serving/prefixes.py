"""What has been read before is not read again: the states of earlier requests, by the tokens that they are of.

Only states that a fresh run without steering would have too: of a steered answer those of its prompt before the last
token, of one that was not steered all. Which tokens these are, the engine says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_lqr.backends.protocol import Decoder
from mlx_lqr.backends.text.text_tokenizer import common_length

WORTHWHILE = 16
"""Tokens that take longer to read than their states to copy"""


@dataclass(frozen=True, eq=False)
class _Kept:
    tokens: tuple[int, ...]
    decoder: Decoder
    """Holds them, and no others."""


class Prefixes:
    """States of token sequences, those not used for longest forgotten first.

    Args:
        count: of how many sequences at most.
        tokens: of how many tokens at most, all sequences together.
    """

    def __init__(self, count: int, tokens: int) -> None:
        self._count, self._limit = count, tokens
        self._kept: list[_Kept] = []
        """The one used last at the end"""

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def tokens(self) -> int:
        """How many tokens' states are kept."""
        return sum(len(one.tokens) for one in self._kept)

    def add(self, tokens: Sequence[int], decoder: Decoder, row: int) -> None:
        """Keep the states that a decoder holds of the first `tokens` of a sequence, where that can be done."""
        if self._count < 1 or not WORTHWHILE <= len(tokens) <= self._limit:
            return
        if any(common_length(one.tokens, tokens) == len(tokens) for one in self._kept):
            return
        alone: Decoder = decoder.apart(row)
        if alone.position > len(tokens) and not alone.rewind(len(tokens)):
            return
        self._kept = [one for one in self._kept if common_length(one.tokens, tokens) < len(one.tokens)]
        self._kept.append(_Kept(tuple(tokens), alone))
        while len(self._kept) > self._count or self.tokens > self._limit:
            del self._kept[0]

    def begins(self, tokens: Sequence[int]) -> bool:
        """Whether the beginning of `tokens` may be held, so that it pays to ask for it."""
        return any(common_length(one.tokens, tokens) >= WORTHWHILE for one in self._kept)

    def longest(self, tokens: Sequence[int]) -> tuple[Decoder, int] | None:
        """A decoder that holds the beginning of `tokens`, as much of it as is kept, and how much that is; or None."""
        shared = {one: common_length(one.tokens, tokens) for one in self._kept}
        for one in sorted(self._kept, key=lambda one: shared[one], reverse=True):
            if shared[one] < WORTHWHILE:
                return None
            decoder: Decoder = one.decoder.apart(0)
            if shared[one] == len(one.tokens) or decoder.rewind(shared[one]):
                self._kept.remove(one)
                self._kept.append(one)
                return decoder, shared[one]
        return None

    def clear(self) -> None:
        """Forget everything."""
        self._kept = []
