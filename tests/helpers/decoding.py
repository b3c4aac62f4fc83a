"""The tokens of the decode loop, as lists."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import mlx_lqr
from mlx_lqr.backends.protocol import Model
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.methods.steering import Steering
from mlx_lqr.runtime import Chat
from mlx_lqr.runtime.decode import decode

if TYPE_CHECKING:  # benchmarks come here too, where nothing is installed for tests
    import pytest


def decoded(model: Model, prompt: list[int], **options: Any) -> list[int]:
    """The tokens that follow one prompt."""
    return [token for _, token in decode(model, [prompt], **options)]


def decoded_together(model: Model, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """The tokens that follow each prompt of a batch."""
    answers: list[list[int]] = [[] for _ in prompts]
    for i, token in decode(model, prompts, **options):
        answers[i].append(token)
    return answers


def tokens(pieces: Iterable[mlx_lqr.Piece]) -> list[int | None]:
    return [piece.token for piece in pieces]


def steering_of(chat: Chat) -> Steering | None:
    """What the chat's last answer is steered with: from the second on, a controller has its law of a conversation."""
    steering = chat.controller
    answered = any(message["role"] == "assistant" for message in chat.messages[:-1])
    return steering.in_conversation() if answered and isinstance(steering, Controller) else steering


def answered_anew(chat: Chat) -> list[int | None]:
    """The last answer, decoded anew from the whole conversation, or what is not forgotten of it."""
    options: mlx_lqr.Options = {**chat.options, "controller": steering_of(chat)}
    if chat.strengths:
        options["strength"] = list(chat.strengths.values())
    return tokens(mlx_lqr.stream(chat.model, chat.model.tokenizer.chat(chat.messages[chat._forgotten : -1]), **options))


def prefill_chunks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a backend fills its cache with `size` tokens at a time."""
    monkeypatch.setattr("mlx_lqr.backends.hooked_decoder.PREFILL_CHUNK", size)
