"""Text in, text out: a prompt, maybe a controller, and the decode loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from mlx_lqr.backends.protocol import Decoder, Model, Progress, Sampling, Trace
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.adapt import readapted
from mlx_lqr.lqr.prompts import Prompt, tokenise
from mlx_lqr.lqr.strength import default_strength
from mlx_lqr.methods.law import AdjustableLaw
from mlx_lqr.methods.recording import RecordedFeedback, Recording
from mlx_lqr.methods.steering import Steering, law_of, only_controller
from mlx_lqr.runtime.decode import Overflow, decode
from mlx_lqr.runtime.stopping import StopStrings

if TYPE_CHECKING:
    from typing_extensions import Unpack

Strength = float | Sequence[float] | None
"""One number for all concepts, or one for each: 0 does not steer; None is what the file recommends, or 1
(`default_strength`)."""
BATCH = 16
"""Prompts decoded side by side: more of them gain little on a CPU and take memory for their caches."""


class Options(TypedDict, total=False):
    """What `generate`, `stream` and `batch_generate` take by keyword."""

    controller: Steering | None
    """A fitted controller of this model, or several made one by `Controller.combine`; or what `fit_baseline` made."""
    strength: Strength
    """The setpoint in multiples of the concept's mean; one number, or one for each concept (what the controller's file
    recommends, or 1). 0 is not steered, while the smallest strengths of a centred controller steer to the level of the
    negative prompts. What it is for other methods: see `fit_baseline`."""
    adaptive: bool | None
    """Compute the gains anew at the very prompt, during prefill (see `adapt`); None, the default, does so with a
    controller that was fitted for it."""
    max_tokens: int
    """How many tokens at most (256)."""
    temperature: float
    """0, the default, takes the most likely token each time."""
    top_p: float
    """Sample from the likeliest tokens with this total probability (1)."""
    top_k: int
    """Sample from this many tokens (0: all)."""
    min_p: float
    """Sample from the tokens at least this likely, relative to the likeliest (0)."""
    repetition_penalty: float
    """Above 1, tokens seen before become less likely (1)."""
    seed: int | None
    """Makes sampling repeatable."""
    stop: str | Sequence[str]
    """Texts that end the answer, and are not part of it."""
    overflow: Overflow
    """"error" refuses what does not fit the model's context, "roll" forgets the oldest tokens instead."""
    record: Recording | None
    """Where alpha_k and |u_k| of every layer and token are kept (a single prompt); by default nowhere, at no cost."""


@dataclass(frozen=True)
class Piece:
    """One generated token and the text that became certain with it (empty while a character is incomplete).

    All pieces together are what prompt and answer decode to, less what the prompt alone decodes to.
    """

    text: str
    token: int | None
    """None for text that was held back, such as the possible beginning of a stop string, when nothing more comes."""


def generate(model: Model, prompt: Prompt, **options: Unpack[Options]) -> str:
    """The text that follows `prompt`, steered by `controller` if one is given.

    Args:
        model: what `load` returned.
        prompt: text (no chat template is added) or token ids.
        **options: see `Options`.

    Raises:
        InputError: an unusable prompt or option, a controller of another model, or a strength at which activations
            overflow.
    """
    return "".join(piece.text for piece in stream(model, prompt, **options))


def stream(
    model: Model, prompt: Prompt, *, decoder: Decoder | None = None, **options: Unpack[Options]
) -> Iterator[Piece]:
    """The same, piece by piece as it is decoded. Wrong arguments are refused at the call, not at the first piece."""
    return (piece for _, piece in _stream(model, [prompt], options, decoder))


def batch_generate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> list[str]:
    """The text that follows each prompt. Prompts are decoded side by side, 16 at a time, each as it would be alone.

    Adaptive control, a context that rolls and recording are each prompt's own: with these, prompts go one by one.

    Args:
        model: what `load` returned.
        prompts: texts or token ids; prompt i is drawn with `seed` + i.
        progress: called as progress("Answers", done, total).
        **options: see `Options`.

    Raises:
        InputError: as `generate`; nothing is decoded where one prompt is unusable.
    """
    texts = [""] * len(prompts)
    for i, piece in batch_stream(model, prompts, progress=progress, **options):
        texts[i] += piece.text
    return texts


def batch_stream(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    records: Sequence[Recording] | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Iterator[tuple[int, Piece]]:
    """The same, as (i, piece) for every piece of what follows prompt i. Nothing more follows the prompts that are done.

    Wrong arguments, and any unusable prompt, are refused at the call.

    Args:
        records: one for each prompt, in place of the option `record`.
    """
    anew = adapts(options.get("controller"), options.get("adaptive"))
    alone = anew or options.get("overflow") == "roll" or records is not None
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


def feedback(
    model: Model, controller: Steering, strength: Strength = None, record: Recording | None = None
) -> AdjustableLaw:
    """The law of a controller or of any other method, after checking that it was fitted on this model."""
    controller.check_model(model)
    if record is None:
        return law_of(controller, strength)
    strength = default_strength(controller) if strength is None else strength
    return RecordedFeedback(only_controller(controller, "recorded"), strength, record)


def adapts(controller: Steering | None, adaptive: bool | None = None) -> bool:
    """Whether gains are recomputed for each prompt: as asked for, or else as the controller was fitted."""
    return adaptive if adaptive is not None else controller is not None and controller.adaptive


def _stream(
    model: Model, prompts: Sequence[Prompt], options: Options, decoder: Decoder | None = None
) -> Iterator[tuple[int, Piece]]:
    settings: dict[str, Any] = dict(options)
    controller, strength = settings.pop("controller", None), settings.pop("strength", None)
    adaptive, stop = adapts(controller, settings.pop("adaptive", None)), settings.pop("stop", ())
    record = settings.pop("record", None)
    loop = {name: settings.pop(name) for name in ("max_tokens", "overflow") if name in settings}
    unknown = settings.keys() - Sampling.__dataclass_fields__.keys()
    if unknown:
        raise TypeError(f"there is no option {', '.join(sorted(unknown))}")
    law = feedback(model, controller, strength, record) if controller is not None else None
    fixed = only_controller(controller, "adaptive") if adaptive and controller is not None else None

    def adapted(trace: Trace) -> AdjustableLaw:
        assert fixed is not None
        return feedback(model, readapted(model, fixed, trace), strength, record)

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
    model: Model,
    tokens: Iterator[tuple[int, int]],
    prompts: Sequence[Sequence[int]],
    stop: tuple[str, ...],
    ended: set[int],
) -> Iterator[tuple[int, Piece]]:
    detokenizers = [model.tokenizer.stream(prompt) for prompt in prompts]
    stops = [StopStrings(stop) for _ in prompts]
    stopped: set[int] = set()
    for i, token in tokens:
        text, found = stops[i].add(detokenizers[i].add(token))
        if found:
            ended.add(i)
            stopped.add(i)
        yield i, Piece(text, token)
    for i, detokenizer in enumerate(detokenizers):
        if i in stopped:
            continue
        text, found = stops[i].add(detokenizer.finish())
        if rest := text if found else text + stops[i].rest():
            yield i, Piece(rest, None)
