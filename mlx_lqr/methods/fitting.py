"""From a model and two sets of prompts to the steering of any method, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_lqr.backends.protocol import Progress, Recorder
from mlx_lqr.lqr.controller import Positions
from mlx_lqr.lqr.layers import Layers
from mlx_lqr.lqr.prompts import Prompt
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.steering import Steering


def fit_baseline(
    model: Recorder,
    method: str,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    concept: str = "concept",
    layers: Layers = None,
    positions: Positions | None = None,
    numbers: Mapping[str, float] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Steering:
    """Fit the steering of a method; `generate`, `steer`, chat and the rest take it like a controller.

    What a strength means is the method's own (`METHODS[method].strengths.meaning`). For every method 0 is not steered.

    Args:
        model: what `load` returned.
        method: one of `METHODS`.
        positive, negative: prompts with and without the concept; strings or token ids.
        concept: the name under which the steering goes.
        layers: the blocks whose output is changed, or from whose heads iti may choose; by default the method's own.
            "auto": those where what the method measures tells the prompts apart (`contrast.choose_layers`); of these,
            for methods that act at the middle one by default, the best; for iti, whose probes choose, all.
        positions: "last" steers the last prompt token and every generated one, "all" every prompt token too; by default
            what the method's paper does.
        numbers, options: the method's own (`METHODS[method].options`), by name, such as kp=0.4; None is as if not
            given.
        progress: called as progress(stage, done, total).

    Returns:
        A `Baseline`, or of the method "alqr" a `Controller`, as `fit` does.

    Raises:
        InputError: no such method, an option that it does not have, or unusable prompts.
    """
    given = {name: value for name, value in {**(numbers or {}), **options}.items() if not _says_nothing(name, value)}
    return METHODS[method].fit_prompts(
        model, positive, negative, given, concept=concept, layers=layers, positions=positions, progress=progress
    )


def _says_nothing(option: str, value: Any) -> bool:
    """Whether it is as if the option were not given: None, or a flag as it is by default."""
    if not isinstance(value, bool):
        return value is None
    own = [one for method in METHODS.values() for one in method.options if one.name == option]
    return any(one.default is value for one in own)
