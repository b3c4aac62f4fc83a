"""The tokens of the decode loop, as lists."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

import mlx_lqr
from mlx_lqr.backends.protocol import Model
from mlx_lqr.runtime.decode import decode


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


def prefill_chunks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a backend fills its cache with `size` tokens at a time."""
    monkeypatch.setattr("mlx_lqr.backends.hooked_decoder.PREFILL_CHUNK", size)
