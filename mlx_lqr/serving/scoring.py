"""How likely a prompt's own tokens are: what `echo` with `logprobs` asks for.

Token i is scored after the tokens before it, and the tokens from `steered_from` on are steered. A client that scores a
continuation and says where its context ends gets the numbers of `mlx-lqr eval lm-eval`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mlx_lqr.backends.protocol import CarryingLaw, Float32, Law, Runner, Scored

LOGITS = 1 << 26
"""Numbers of logits at once, 256 MB of them"""


def score_prompt(
    model: Runner, tokens: Sequence[int], law: Law | None, *, steered_from: int, top: int, size: int
) -> Iterator[list[Scored]]:
    """The scores of all tokens but the first, part by part.

    Args:
        law: what steers, not placed; None for nothing.
        steered_from: the first position that is steered.
        top: how many of the likeliest tokens are told at each position, with their log p.
        size: of a part, at most.

    Raises:
        OverflowingError: activations overflow.
    """
    size, last = max(1, min(size, LOGITS // model.vocab_size)), len(tokens) - 1
    steered_from = last if law is None else min(steered_from, last)
    decoder = model.decoder(law)
    if not decoder.fills_in_parts:
        size = last
    steered_size = 1 if isinstance(law, CarryingLaw) else size
    for start, end in [*_parts(0, steered_from, size), *_parts(steered_from, last, steered_size)]:
        logits = decoder.logits_along(tokens[start:end], steered=start >= steered_from)
        if np.isnan(logits).any():
            raise model.decoder(law).overflow(tokens[:end], steered_from)
        yield [_of_token(row, token, top) for row, token in zip(logits, tokens[start + 1 : end + 1], strict=True)]


def _parts(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, end) in parts."""
    for begin in range(start, end, size):
        yield begin, min(begin + size, end)


def _of_token(logits: Float32, token: int, top: int) -> Scored:
    """By logits (V,)."""
    highest = logits.max()
    logprobs = logits - (highest + np.log(np.exp(logits - highest).sum(dtype=np.float64)))
    likeliest = np.argpartition(-logits, min(top, len(logits) - 1))[:top] if top else np.empty(0, np.int64)
    likeliest = likeliest[np.argsort(-logits[likeliest], kind="stable")]
    return float(logprobs[token]), tuple((int(other), float(logprobs[other])) for other in likeliest)
