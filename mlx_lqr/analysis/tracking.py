"""How closely the feature follows its setpoint at a prompt, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lqr.backends.protocol import Recorder
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.prompts import Prompt, tokenise
from mlx_lqr.lqr.tracking import Tracking
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.methods.law import check_strength


def track(
    model: Recorder,
    prompt: Prompt,
    controller: Controller,
    strength: float | Sequence[float],
    *,
    steered: bool = True,
) -> Tracking:
    """Run a prompt under a controller and compare feature and setpoint at its last token.

    Args:
        model: what `load` returned.
        prompt: a string or token ids.
        controller: of this model.
        strength: one number for all concepts, or one for each.
        steered: False runs the prompt without the controller and compares with the same setpoint.

    Raises:
        InputError: an unusable prompt or strength, or a controller of another model.
    """
    controller.check_model(model)
    law = LinearFeedback(controller, strength) if steered else None
    residual = model.residuals([tokenise(model, prompt)], law=law, steer_all=controller.positions == "all")[0, :-1]
    return Tracking.at(controller, residual, check_strength(strength, len(controller.concepts)))
