"""The decode loop: prefill, then one token after another. Step n + 1 already runs while token n is yielded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, cast, get_args

from mlx_lqr.backends.overflow import first_overflow
from mlx_lqr.backends.protocol import GREEDY, OVERFLOWED, Decoder, Law, Runner, Sampling, Trace, TracingDecoder
from mlx_lqr.errors import InputError, OverflowingError
from mlx_lqr.lqr.prompts import Prompt, tokenise

Overflow = Literal["error", "roll"]
"""What to do when prompt and answer do not fit the model's context."""
MAX_TOKENS = 256
"""The default limit of new tokens."""


def decode(
    model: Runner,
    prompts: Sequence[Prompt],
    *,
    law: Law | None = None,
    steer_all: bool = False,
    sampling: Sampling = GREEDY,
    max_tokens: int = MAX_TOKENS,
    overflow: Overflow = "error",
    ended: set[int] | None = None,
    adapted: Callable[[Trace], Law] | None = None,
    decoder: Decoder | None = None,
) -> Iterator[tuple[int, int]]:
    """Yield (i, token) for the tokens that follow prompt i, until its end token (not yielded) or `max_tokens`.

    Prompts are decoded side by side, each with the tokens it would get alone. A prompt's last token and every generated
    token are steered; with `steer_all` every prompt token is too.

    Args:
        ended: the consumer may add i to it, to end sequence i.
        adapted: makes the law from the prompt's trace, which is taken during prefill (a single prompt).
        decoder: one that already holds the first tokens of the (single) prompt.

    Raises:
        InputError: at the call, an unusable prompt (see `tokenise`), `max_tokens` below 1, or more tokens than the
            context holds without `overflow="roll"`.
        OverflowingError: later, activations overflow (the layer is named).
    """
    if overflow not in get_args(Overflow):
        raise InputError(f"overflow must be one of {', '.join(get_args(Overflow))}, not {overflow!r}")
    rolling = overflow == "roll"
    tokens = [tokenise(model, prompt, any_length=rolling) for prompt in prompts]
    if max_tokens < 1:
        raise InputError(f"max_tokens (-n) must be at least 1, not {max_tokens}")
    longest = max(len(prompt) for prompt in tokens)
    room = room_after(model, longest)
    if max_tokens > room and not rolling:
        raise InputError(
            f"{longest} prompt tokens and {max_tokens} new ones do not fit the model's context of "
            f"{model.context_length}: ask for at most {room} (max_tokens, -n), or let the context roll (overflow "
            '"roll", --overflow roll)'
        )
    new = decoder is None
    decoder = decoder or model.decoder(rolling=rolling)
    if not new:
        decoder.law, decoder.sampling = law, sampling

    def begin() -> Decoder:
        if new:  # only when the first token is asked for, since placing a law's arrays takes memory
            decoder.law, decoder.sampling = law, sampling
        return decoder

    def another() -> Decoder:
        return model.decoder(decoder.law, rolling=rolling)

    return _decode(model, tokens, begin, another, steer_all, max_tokens, set() if ended is None else ended, adapted)


def room_after(model: Runner, prompt_length: int) -> int:
    """How many new tokens fit the model's context after a prompt. The last one is never fed back, so needs no room."""
    return model.context_length + 1 - prompt_length


def _decode(
    model: Runner,
    prompts: Sequence[Sequence[int]],
    begin: Callable[[], Decoder],
    another: Callable[[], Decoder],
    steer_all: bool,
    max_tokens: int,
    ended: set[int],
    adapted: Callable[[Trace], Law] | None,
) -> Iterator[tuple[int, int]]:
    decoder, end_tokens = begin(), model.tokenizer.end_tokens
    decoder.fill([prompt[decoder.position : -1] for prompt in prompts], steered=steer_all)
    last = [prompt[-1] for prompt in prompts]
    sequences = [list(prompt) for prompt in prompts]

    def overflow(i: int) -> OverflowingError:
        return another().overflow(sequences[i], 0 if steer_all else len(prompts[i]) - 1)

    if adapted is not None:
        trace = cast(TracingDecoder, decoder).trace(last[0])  # whoever adapts has asked for one
        if first_overflow(trace.residual) is not None:
            raise overflow(0)
        decoder.law = adapted(trace)
    running = list(range(len(prompts)))  # which prompt each row of the decoder belongs to
    tokens = decoder.sample(decoder.step(last))
    for count in range(1, max_tokens + 1):
        following = decoder.sample(decoder.step(tokens)) if count < max_tokens else None
        values = tokens.tolist()
        if OVERFLOWED in values:
            spoiled = [i for i, value in zip(running, values, strict=True) if value == OVERFLOWED]
            raise overflow(max(spoiled, key=lambda i: len(prompts[i])))  # whose tokens may pad the others
        for i, value in zip(running, values, strict=True):
            sequences[i].append(value)
            if value in end_tokens:
                ended.add(i)
            else:
                yield i, value
        rows = [row for row, i in enumerate(running) if i not in ended]
        if following is None or not rows:
            return
        if len(rows) < len(running):
            following = decoder.keep(rows, following)
            running = [running[row] for row in rows]
        tokens = following
