"""Tiny models on torch: their tokens from transformers' generation and from our own loop."""

from __future__ import annotations

from typing import Any

import torch

import mlx_lqr
from helpers.backends import tiny_on
from helpers.decoding import decoded
from mlx_lqr.backends.torch.model import TorchModel
from mlx_lqr.methods.running import law_on

STEERED = ["llama", "gemma3_text"]
"""The latter's sliding window is shorter than the prompts."""


def small(family: str = "llama", **changes: Any) -> TorchModel:
    """Untied, or a llama this small says one token again and again, and that would hide much."""
    untied = {"tie_word_embeddings": False} if family == "llama" else {}
    model: TorchModel = tiny_on("torch", family, **untied, **changes)
    return model


def ours(model: TorchModel, prompt: list[int], controller: mlx_lqr.Controller, max_tokens: int = 8) -> list[int]:
    law, steer_all = law_on(model, controller, 2.0), controller.positions == "all"
    return decoded(model, prompt, law=law, steer_all=steer_all, max_tokens=max_tokens)


def theirs(model: TorchModel, prompt: list[int], max_tokens: int = 8, **options: Any) -> list[int]:
    tokens = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    output = model.module.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_tokens, **options)
    return [int(token) for token in output[0, len(prompt) :]]
