"""Which positions to steer when mlx_lm's own generation functions, and not ours, call the model.

mlx_lm fills its cache in chunks. The last position of a chunk is not the last token of the prompt, and the model cannot
tell from a call which it sees; so while a model is steered, the two places where mlx_lm works through a prompt
announce it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn


class Positions:
    """How many leading positions of the current call are not steered."""

    def __init__(self, steer_all: bool) -> None:
        self.unsteered = 0
        self.prompt_left: float | None = None
        """Prompt tokens still to come that are not the prompt's last; None while no prompt is announced."""
        self._steer_all = steer_all

    def begin(self, length: int) -> None:
        """A call of the model with `length` positions starts."""
        if self._steer_all:
            self.unsteered = 0
        elif self.prompt_left is None:  # called by nobody we know: take each call for a whole prompt, or for one step
            self.unsteered = length - 1
        else:
            self.unsteered = int(min(length, self.prompt_left))
            self.prompt_left -= self.unsteered


@contextmanager
def announcing_prompts(module: nn.Module, positions: Positions) -> Iterator[None]:
    """Inside this context, mlx_lm's generate_step and its batched prompt processing announce `module`'s prompts."""
    library: Any = importlib.import_module("mlx_lm.generate")
    batch = library.PromptProcessingBatch
    original_step, original_prompt = library.generate_step, batch.prompt

    def generate_step(prompt: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if model is module:
            embeddings = kwargs.get("input_embeddings")
            positions.prompt_left = len(prompt if embeddings is None else embeddings) - 1
        try:
            yield from original_step(prompt, model, *args, **kwargs)
        finally:
            if model is module:
                positions.prompt_left = None

    def prompt(self: Any, tokens: Any) -> None:
        before = positions.prompt_left
        if self.model is module:
            positions.prompt_left = float("inf")  # the prompts' last tokens are left to the first generation step
        try:
            original_prompt(self, tokens)
        finally:
            positions.prompt_left = before

    library.generate_step, batch.prompt = generate_step, prompt
    try:
        yield
    finally:
        library.generate_step, batch.prompt = original_step, original_prompt
