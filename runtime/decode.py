"""The decode loop: prefill, then one token after another; step n + 1 is under way while token n is handed out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlx_lqr.backends.base import GREEDY, Law, Model, Sampling
from mlx_lqr.contrast import Prompt, tokenise
from mlx_lqr.errors import InputError


def decode(
    model: Model,
    prompt: Prompt,
    *,
    law: Law | None = None,
    steer_all: bool = False,
    sampling: Sampling = GREEDY,
    max_tokens: int = 256,
) -> Iterator[int]:
    """Yield the tokens that follow `prompt`, until an end token (not yielded), `max_tokens`, or a full context.

    Steered are the prompt's last token and every generated one, and with `steer_all` every prompt token too.

    Raises:
        InputError: an unusable prompt (see `tokenise`), or no token asked for.
    """
    tokens = tokenise(model, prompt)
    if max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, not {max_tokens}")
    return _decode(model, tokens, law, steer_all, sampling, max_tokens)


def _decode(
    model: Model, tokens: Sequence[int], law: Law | None, steer_all: bool, sampling: Sampling, max_tokens: int
) -> Iterator[int]:
    decoder = model.decoder(law, sampling)
    end_tokens = model.tokenizer.end_tokens
    token = decoder.sample(decoder.prefill(tokens, steer_from=0 if steer_all else len(tokens) - 1))
    for count in range(1, max_tokens + 1):
        room = count < max_tokens and decoder.position < model.context_length
        following = decoder.sample(decoder.step(token)) if room else None
        if int(token) in end_tokens:
            return
        yield int(token)
        if following is None:
            return
        token = following
