"""How likely a prompt's own tokens are: what `echo` with `logprobs` asks for.

Token i is scored after the tokens before it, and the tokens from `steered_from` on are steered. A client that scores a
continuation and says where its context ends gets the numbers of `mlx-lqr eval lm-eval`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mlx_lqr.backends.protocol import CarryingLaw, Float32, Law, Recorder, Scored

LOGITS = 1 << 26
"""Numbers of logits at once, 256 MB of them, wherever a prompt can be scored in stretches"""


def score_prompt(
    model: Recorder, tokens: Sequence[int], law: Law | None, *, steered_from: int, top: int
) -> Iterator[list[Scored]]:
    """The scores of all tokens but the first, stretch by stretch.

    Args:
        law: what steers, not placed; None for nothing.
        steered_from: the first position that is steered.
        top: how many of the likeliest tokens are told at each position, with their log p.

    Raises:
        OverflowingError: activations overflow.
    """
    size, last = max(1, LOGITS // model.vocab_size), len(tokens) - 1
    apart = last if law is None else min(steered_from, last)
    for start, end in _stretches(0, apart, size):
        yield _scored(model, tokens, start, end, None, top, steer_all=False)
    if apart == last:
        return
    in_parts = apart == 0 and not isinstance(law, CarryingLaw)  # else a part would not be steered as all before it is
    for start, end in _stretches(apart, last, size if in_parts else last):
        yield _scored(model, tokens, start, end, law, top, steer_all=in_parts)


def _stretches(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, end) in parts."""
    for begin in range(start, end, size):
        yield begin, min(begin + size, end)


def _scored(
    model: Recorder, tokens: Sequence[int], start: int, end: int, law: Law | None, top: int, *, steer_all: bool
) -> list[Scored]:
    """Of the tokens after positions `start` to `end` - 1."""
    pair = tokens[: start + 1], tokens[start + 1 : end]
    (logits,) = model.logits_along([pair], law=law, steer_all=steer_all)
    return [_of_token(row, token, top) for row, token in zip(logits, tokens[start + 1 : end + 1], strict=True)]


def _of_token(logits: Float32, token: int, top: int) -> Scored:
    """By logits (V,)."""
    highest = logits.max()
    logprobs = logits - (highest + np.log(np.exp(logits - highest).sum(dtype=np.float64)))
    likeliest = np.argpartition(-logits, min(top, len(logits) - 1))[:top] if top else np.empty(0, np.int64)
    likeliest = likeliest[np.argsort(-logits[likeliest], kind="stable")]
    return float(logprobs[token]), tuple((int(other), float(logprobs[other])) for other in likeliest)
