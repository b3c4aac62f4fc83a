"""Controllers and laws for the tiny models, fitted on a few prompts of token ids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx_lqr
from mlx_lqr.backends.protocol import Model
from mlx_lqr.methods.alqr import LinearFeedback

POSITIVE, NEGATIVE = [[1, 2, 3], [4, 5]], [[6, 7], [8]]
CONTRASTS = {"a": (POSITIVE, NEGATIVE), "b": ([[9, 10]], [[11, 12, 13]])}


def controller_for(model: Model, concept: str = "a", **options: Any) -> mlx_lqr.Controller:
    """A controller of one of the two concepts, at all layers unless told otherwise."""
    return mlx_lqr.fit(
        model, *CONTRASTS[concept], q=1.0, concept=concept, **{"layers": "all", "cost": "state", **options}
    )


def law_for(model: Model, strength: float = 2.0) -> LinearFeedback:
    return LinearFeedback(controller_for(model), strength)


def mirrored(controller: mlx_lqr.Controller) -> mlx_lqr.Controller:
    """One with another direction: the same numbers from the last to the first."""
    readout = controller.readout
    flipped = None if readout is None else readout[:, ::-1]
    return replace(controller, direction=controller.direction[:, ::-1], readout=flipped)
