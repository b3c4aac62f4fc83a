"""Attention of a transformers model, as our own passes run it.

transformers' models hand their queries, keys and values to a function that their config names. For the time of a pass
that name is ours, and the masks are those of the pass's `Layout`: built for any mixture of full and sliding layers,
padded batches and rolling contexts alike, without a look at any number on the device, so that a pass can be recorded as
a CUDA graph.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.nn import functional

from mlx_lqr.backends.borrowed import changed
from mlx_lqr.backends.torch.library import attention_by, register_attention
from mlx_lqr.errors import InputError

NAME = "mlx_lqr"


_OF_NO_MATTER = frozenset({"position_ids", "use_cache", "output_router_logits"})
"""Arguments with which transformers' models call attention in our own passes, and which the layout speaks for."""


class Layout(Protocol):
    """What the queries of a pass may see."""

    differentiable: bool
    """Whether attention has to be made of plain products, which every kind of derivative goes through."""

    def mask(self, window: int | None) -> torch.Tensor:
        """Which of S keys each of L queries sees, True for seen: (B or 1, 1, L, S).

        Args:
            window: how many of the newest tokens a sliding layer sees, or None.
        """


class WholePrompts:
    """Prompts (B, L) in one pass without a cache: each token sees itself and those before it."""

    differentiable = False

    def __init__(self, length: int, device: torch.device) -> None:
        self._at = torch.arange(length, device=device)
        self._masks: dict[int | None, torch.Tensor] = {}

    def mask(self, window: int | None) -> torch.Tensor:
        if window not in self._masks:
            self._masks[window] = seen(self._at, self._at, window)[None, None]
        return self._masks[window]


def seen(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """Which of the keys at positions (S,) the queries at positions (L,) see: (L, S)."""
    queries, keys = queries[:, None], keys[None]
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)


class _Passes(threading.local):
    """The passes that this thread has under way."""

    def __init__(self) -> None:
        self.layouts: list[Layout] = []
        """The innermost last"""

    @property
    def layout(self) -> Layout:
        """Of the innermost.

        Raises:
            InputError: there is none: another thread's pass has put our attention in the place of the model's own.
        """
        if not self.layouts:
            raise InputError(
                "another thread runs this model through mlx_lqr at present: call transformers' functions inside "
                "mlx_lqr.steer, or when that is done"
            )
        return self.layouts[-1]


_passes = _Passes()


@contextmanager
def attending(config: Any, layout: Layout) -> Iterator[None]:
    """Inside this context a model with this config attends by `layout`; afterwards as before."""
    _passes.layouts.append(layout)
    try:
        with attention_by(config, NAME):
            yield
    finally:
        _passes.layouts.pop()


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention by the current layout, in the form that transformers calls: (B, L, H, D).

    The query heads that share a key head are folded into the length, so that no key is ever copied for them.

    Args:
        query: (B, H, L, D).
        key, value: (B, G, S, D), G a divisor of H.
        attention_mask: the model's own, which is not used.
        others: what does not change which keys are seen, or how.

    Raises:
        InputError: an argument that may change just that, as where transformers has renamed one.
    """
    layout = _passes.layout
    if unknown := others.keys() - _OF_NO_MATTER:
        raise changed("transformers", f"gives attention the argument {min(unknown)}")
    mask = layout.mask(sliding_window)
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    repeats = heads // groups
    folded = query.reshape(batch, groups, repeats * length, width)
    if repeats > 1:
        mask = mask.repeat(1, 1, repeats, 1) if length > 1 else mask.expand(-1, -1, repeats, -1)
    if softcap is None and not layout.differentiable:
        output = functional.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    else:
        output = _by_products(folded, key, value, mask, scaling, softcap)
    return output.reshape(batch, heads, length, value.shape[-1]).transpose(1, 2), None


def _by_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """transformers' mask for `attend`: a pass of ours brings one, so that it is another thread that asks."""
    _ = _passes.layout


register_attention(NAME, attend, _no_mask)
