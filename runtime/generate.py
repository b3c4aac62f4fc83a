"""Text in, text out: a prompt, a controller if there is one, and the decode loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from mlx_lqr.backends.capabilities import DIFFERENTIABLE, require
from mlx_lqr.backends.protocol import Decoder, Progress, Runner, Sampling, Trace
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.adapt import adapt_at
from mlx_lqr.lqr.prompts import Prompt, tokenise
from mlx_lqr.methods.law import AdjustableLaw
from mlx_lqr.methods.recording import Recording
from mlx_lqr.methods.running import adapts, law_on
from mlx_lqr.methods.steering import Steering, only_controller
from mlx_lqr.runtime.decode import Overflow, decode
from mlx_lqr.runtime.stopping import StopStrings

if TYPE_CHECKING:
    from typing_extensions import Unpack

Strength = float | Sequence[float] | None
"""One number for all concepts, or one for each. 0 does not steer; None is the recommended strength, or 1
(`default_strength`)."""
BATCH = 16
"""Prompts decoded side by side. More gain little on a CPU, and their caches take memory."""


class Options(TypedDict, total=False):
    """What `generate`, `stream` and `batch_generate` take by keyword."""

    controller: Steering | None
    """A controller fitted on this model, several combined by `Controller.combine`, or what `fit_baseline` returned."""
    strength: Strength
    """How far to steer; one number, or one for each concept (default: the recommended strength, or 1). For a controller
    it is the setpoint in multiples of mu_k. 0 does not steer at all; a centred controller at a very small strength
    steers to the level of the negative prompts. For other methods see `fit_baseline`."""
    adaptive: bool | None
    """Recompute the gains for each prompt, during prefill (see `adapt`). None, the default, does so for controllers
    fitted with cost="adaptive"."""
    max_tokens: int
    """How many tokens at most (256)."""
    temperature: float
    """Higher is more random (0.8); 0 takes the most likely token each time, whatever top_p, top_k and min_p are."""
    top_p: float
    """Sample from the likeliest tokens with this total probability (0.9; 1: all)."""
    top_k: int
    """Sample from this many tokens (0: all)."""
    min_p: float
    """Sample from the tokens at least this likely, relative to the likeliest (0)."""
    repetition_penalty: float
    """Above 1, tokens seen before become less likely (1)."""
    frequency_penalty: float | None
    """Subtracted from a token's logit for each time that it is among the last 64 drawn; -2 to 2. None, the default:
    0.3, and 0 at temperature 0."""
    presence_penalty: float
    """Subtracted once where it is among them at all; -2 to 2 (0)."""
    seed: int | None
    """The same seed gives the same text. None, the default, draws another text each time."""
    stop: str | Sequence[str]
    """Texts that end the answer; they are not part of it."""
    overflow: Overflow
    """"error" refuses what does not fit the model's context; "roll" forgets the oldest tokens instead."""
    record: Recording | None
    """Keeps alpha_k and |u_k| of every layer and token (a single prompt). By default they are not kept."""


@dataclass(frozen=True)
class Piece:
    """One generated token and the text that it completes (empty while a character is incomplete).

    The texts of all pieces, joined, are the decoded prompt and answer without the decoded prompt.
    """

    text: str
    token: int | None
    """None for text that was held back until the end, such as one that could have begun a stop string."""


def generate(model: Runner, prompt: Prompt, **options: Unpack[Options]) -> str:
    """The text that follows `prompt`, steered if a `controller` is given.

    Args:
        model: what `load` returned.
        prompt: text (no chat template is added) or token ids.
        **options: see `Options`.

    Raises:
        InputError: an unusable prompt or option, or a controller of another model.
        OverflowingError: activations overflow, mostly because the strength is too high.
    """
    return "".join(piece.text for piece in stream(model, prompt, **options))


def stream(
    model: Runner, prompt: Prompt, *, decoder: Decoder | None = None, **options: Unpack[Options]
) -> Iterator[Piece]:
    """`generate`, piece by piece as it is decoded. Wrong arguments are refused at the call, not at the first piece."""
    return (piece for _, piece in _stream(model, [prompt], options, decoder))


def batch_generate(
    model: Runner,
    prompts: Sequence[Prompt],
    *,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> list[str]:
    """The text that follows each prompt. Up to 16 prompts are decoded side by side, with the text each would get alone.

    With adaptive gains or a rolling context, prompts are decoded one by one.

    Args:
        model: what `load` returned.
        prompts: texts or token ids; prompt i is sampled with `seed` + i.
        progress: called as progress("Answers", done, total).
        **options: see `Options`.

    Raises:
        InputError: as for `generate`. If one prompt is unusable, none is decoded.
    """
    texts = [""] * len(prompts)
    for i, piece in batch_stream(model, prompts, progress=progress, **options):
        texts[i] += piece.text
    return texts


def batch_stream(
    model: Runner,
    prompts: Sequence[Prompt],
    *,
    records: Sequence[Recording] | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Iterator[tuple[int, Piece]]:
    """`batch_generate`, piece by piece: (i, piece) for every piece of the text that follows prompt i.

    Wrong arguments, and any unusable prompt, are refused at the call.

    Args:
        records: one for each prompt, in place of the option `record`. Prompts are then decoded one by one.
    """
    adaptive = adapts(options.get("controller"), options.get("adaptive"))
    alone = adaptive or options.get("overflow") == "roll" or records is not None
    size, seed = 1 if alone else BATCH, options.get("seed")
    batches = []
    for start in range(0, len(prompts), size):
        own: Options = {**options}
        if seed is not None:
            own["seed"] = seed + start
        if records is not None:
            own["record"] = records[start]
        batches.append((start, _stream(model, prompts[start : start + size], own)))
    return _one_after_another(batches, len(prompts), progress)


def _one_after_another(
    batches: Sequence[tuple[int, Iterator[tuple[int, Piece]]]], total: int, progress: Progress | None
) -> Iterator[tuple[int, Piece]]:
    ends = [start for start, _ in batches[1:]] + [total]
    for (start, pieces), end in zip(batches, ends, strict=True):
        for i, piece in pieces:
            yield start + i, piece
        if progress:
            progress("Answers", end, total)


def _stream(
    model: Runner, prompts: Sequence[Prompt], options: Options, decoder: Decoder | None = None
) -> Iterator[tuple[int, Piece]]:
    settings: dict[str, Any] = dict(options)
    controller, strength = settings.pop("controller", None), settings.pop("strength", None)
    adaptive, stop = adapts(controller, settings.pop("adaptive", None)), settings.pop("stop", ())
    record = settings.pop("record", None)
    loop = {name: settings.pop(name) for name in ("max_tokens", "overflow") if name in settings}
    unknown = settings.keys() - Sampling.__dataclass_fields__.keys()
    if unknown:
        raise TypeError(f"there is no option {', '.join(sorted(unknown))}")
    law = law_on(model, controller, strength, record) if controller is not None else None
    fixed = only_controller(controller, "adaptive") if adaptive and controller is not None else None
    differentiable = require(model, DIFFERENTIABLE, "adapt gains to a prompt") if fixed is not None else None

    def adapted(trace: Trace) -> AdjustableLaw:
        assert fixed is not None
        assert differentiable is not None
        return law_on(model, adapt_at(differentiable, fixed, trace), strength, record)

    if record is not None and len(prompts) > 1:
        raise InputError("a batch cannot be recorded: decode one prompt at a time, or give batch_stream `records`")
    ended: set[int] = set()
    own = [tokenise(model, prompt, any_length=True) for prompt in prompts]
    tokens = decode(
        model,
        own,
        law=law,
        steer_all=controller is not None and controller.positions == "all",
        sampling=Sampling(**settings),
        ended=ended,
        adapted=adapted if fixed is not None else None,
        decoder=decoder,
        **loop,
    )
    return _pieces(model, tokens, own, StopStrings.check(stop), ended)


def _pieces(
    model: Runner,
    tokens: Iterator[tuple[int, int]],
    prompts: Sequence[Sequence[int]],
    stop: tuple[str, ...],
    ended: set[int],
) -> Iterator[tuple[int, Piece]]:
    detokenizers = [model.tokenizer.stream(prompt) for prompt in prompts]
    stops = [StopStrings(stop) for _ in prompts]
    stopped: set[int] = set()
    for i, token in tokens:
        text, is_stopped = stops[i].add(detokenizers[i].add(token))
        if is_stopped:
            ended.add(i)
            stopped.add(i)
        yield i, Piece(text, token)
    for i, detokenizer in enumerate(detokenizers):
        if i in stopped:
            continue
        text, is_stopped = stops[i].add(detokenizer.finish())
        if rest := text if is_stopped else text + stops[i].rest():
            yield i, Piece(rest, None)
