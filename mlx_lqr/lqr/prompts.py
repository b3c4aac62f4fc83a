"""Prompts as token ids, checked against a model."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lqr.backends.protocol import Runner
from mlx_lqr.errors import InputError

Prompt = str | Sequence[int]
"""Text (tokenised as it is, no chat template) or token ids."""


def tokenise(model: Runner, prompt: Prompt, *, any_length: bool = False) -> list[int]:
    """Token ids of a prompt, checked: not empty, in the vocabulary and, unless `any_length`, in the model's context."""
    tokens = model.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    if not tokens:
        raise InputError("a prompt is empty: give it at least one token")
    if min(tokens) < 0 or max(tokens) >= model.vocab_size:
        raise InputError(f"token ids must be between 0 and {model.vocab_size - 1} for this model")
    if len(tokens) > model.context_length and not any_length:
        raise InputError(
            f"the prompt has {len(tokens)} tokens and the model's context {model.context_length}: shorten the prompt"
        )
    return tokens


def tokenise_sets(
    model: Runner, positive: Sequence[Prompt], negative: Sequence[Prompt]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of two sets of prompts, checked: each prompt as in `tokenise`, no set empty, the sets different."""
    sets = _tokenise_set(model, positive, "positive"), _tokenise_set(model, negative, "negative")
    if sorted(sets[0]) == sorted(sets[1]):
        raise InputError("the positive and the negative prompts are the same: there is nothing to tell apart")
    return sets


def _tokenise_set(model: Runner, prompts: Sequence[Prompt], name: str) -> list[list[int]]:
    if isinstance(prompts, str):
        raise InputError(f"the {name} prompts must be a list of prompts, not one string")
    if not prompts:
        raise InputError(f"there are no {name} prompts: give at least one")
    return [tokenise(model, prompt) for prompt in prompts]
