"""How closely the feature follows its setpoint, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_lqr.backends.base import Float32, Model
from mlx_lqr.contrast import Prompt, tokenise
from mlx_lqr.controller import Controller
from mlx_lqr.laws import LinearFeedback, check_strength


@dataclass(frozen=True)
class Tracking:
    """Feature and setpoint at the last token of a prompt, both in the residual stream's own units; (T, m) each."""

    feature: Float32
    """beta_k = v_k . z_k at the input of block k"""
    setpoint: Float32
    """beta*_k = offset_k + strength mu_k"""


def track(
    model: Model,
    prompt: Prompt,
    controller: Controller,
    strength: float | Sequence[float],
    *,
    steered: bool = True,
) -> Tracking:
    """Run a prompt under a controller (or, not `steered`, without it) and compare the feature with its setpoint.

    Raises:
        InputError: an unusable prompt or strength, or a controller of another model.
    """
    controller.check_model(model)
    law = LinearFeedback(controller, strength) if steered else None
    residual = model.residuals([tokenise(model, prompt)], law=law, steer_all=controller.positions == "all")[0, :-1]
    strengths = np.asarray(check_strength(strength, len(controller.concepts)), np.float32)
    return Tracking(
        np.einsum("kdm,kd->km", controller.direction, residual),
        controller.offset + controller.setpoint * strengths,
    )
