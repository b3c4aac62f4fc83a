"""What the analyses take: prompts, a controller of one concept, strengths and a seed, checked before long work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_lqr.backends.protocol import Runner
from mlx_lqr.concepts import bundled_prompts
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.controller import Controller

SETS = ("church", "cloud", "dog", "football", "formal", "joy", "love", "ocean", "polite", "refusal", "truth")
"""Whose sentences are the default prompts: named, so that one more bundled set changes no measurement."""


def default_prompts(count: int, without: Sequence[str] = ()) -> list[str]:
    """Bundled sentences, without those of the concepts named, cut in the middle so that their last tokens differ."""
    names = [name for name in SETS if name not in without]
    sentences = [
        sentence for pair in zip(*(bundled_prompts(name)[1] for name in names), strict=False) for sentence in pair
    ]
    cut = []
    for i, sentence in enumerate(dict.fromkeys(sentences)):
        words = sentence.split()
        cut.append(" ".join(words[: max(2, len(words) // 2 + i % 3)]))
    return list(dict.fromkeys(cut))[:count]


def check_strengths(strengths: Sequence[float]) -> None:
    """Raise `InputError` unless there are strengths and each is finite and not 0."""
    if not len(strengths) or not np.all(np.isfinite(strengths)):
        raise InputError("at least one finite strength is needed")
    if not np.all(strengths):
        raise InputError("strength 0 is not steered, so there is nothing to measure: leave it out")


def check_seed(seed: int) -> None:
    """Raise `InputError` for a seed that NumPy does not take."""
    if seed < 0:
        raise InputError(f"seed must be zero or above, not {seed}")


def check_single(controller: Controller, model: Runner) -> None:
    """Raise `InputError` unless the controller is of this model, has one concept and steers at some layer."""
    controller.check_model(model)
    if len(controller.concepts) > 1:
        raise InputError(
            f"this analyses one concept at a time, and the controller has {', '.join(controller.concepts)}: "
            "give the file of one of them"
        )
    if not controller.active_layers:
        raise InputError("the controller does nothing at any layer: fit it again")
