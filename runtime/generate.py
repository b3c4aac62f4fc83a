"""Text in, text out: a prompt, maybe a controller, and the decode loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_lqr.backends.base import Model, Sampling
from mlx_lqr.contrast import Prompt
from mlx_lqr.controller import Controller
from mlx_lqr.laws import LinearFeedback
from mlx_lqr.runtime.decode import decode

Strength = float | Sequence[float]


@dataclass(frozen=True)
class Piece:
    """One generated token and the text that became certain with it (empty while a character is incomplete)."""

    text: str
    token: int


def generate(
    model: Model,
    prompt: Prompt,
    *,
    controller: Controller | None = None,
    strength: Strength = 1.0,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
) -> str:
    """The text that follows `prompt`, steered by `controller` if one is given.

    Args:
        model: what `load` returned.
        prompt: text (no chat template is added) or token ids.
        controller: a fitted controller of this model, or several made one by `Controller.combine`.
        strength: the setpoint in multiples of the concept's mean; one number, or one for each concept.
        max_tokens: how many tokens at most.
        temperature: 0 takes the most likely token each time.
        top_p, top_k, min_p: keep only the likeliest tokens when sampling; the defaults keep all.
        seed: makes sampling repeatable.

    Raises:
        InputError: an unusable prompt or option, or a controller of another model.
    """
    pieces = stream(
        model,
        prompt,
        controller=controller,
        strength=strength,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
    )
    return model.tokenizer.decode([piece.token for piece in pieces])


def stream(
    model: Model,
    prompt: Prompt,
    *,
    controller: Controller | None = None,
    strength: Strength = 1.0,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
) -> Iterator[Piece]:
    """The same, piece by piece as it is decoded. Wrong arguments are refused at the call, not at the first piece."""
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    law = feedback(model, controller, strength) if controller is not None else None
    tokens = decode(
        model,
        prompt,
        law=law,
        steer_all=controller is not None and controller.positions == "all",
        sampling=sampling,
        max_tokens=max_tokens,
    )
    return _pieces(model, tokens)


def feedback(model: Model, controller: Controller, strength: Strength) -> LinearFeedback:
    """The controller's law, after checking that it was fitted on this model."""
    controller.check_model(model)
    return LinearFeedback(controller, strength)


def _pieces(model: Model, tokens: Iterator[int]) -> Iterator[Piece]:
    detokenizer = model.tokenizer.stream()
    for token in tokens:
        yield Piece(detokenizer.add(token), token)
