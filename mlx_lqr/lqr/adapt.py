"""A controller made for the very prompt in hand: gains for the feature cost at its last token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mlx_lqr.backends.capabilities import DIFFERENTIABLE, require
from mlx_lqr.backends.protocol import Differentiable, Trace
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.contrast import Contrast
from mlx_lqr.lqr.controller import Controller, Positions, Setpoint, assemble
from mlx_lqr.lqr.gains import aims, feature_feedback, pull_back
from mlx_lqr.lqr.layers import Layers, choose_layers
from mlx_lqr.lqr.prompts import Prompt, tokenise
from mlx_lqr.lqr.riccati import WEIGHT, Product, Weights


def adapt(
    model: Differentiable,
    concept: Contrast | Controller,
    prompt: Prompt,
    *,
    name: str = "concept",
    q: float = WEIGHT,
    r: float = 1.0,
    qf: float = WEIGHT,
    layers: Layers = None,
    setpoint: Setpoint = "centred",
    positions: Positions = "last",
) -> Controller:
    """A controller linearised at the last token of the very prompt that it is to steer (feature cost).

    Args:
        model: what `load` returned.
        concept: a contrast, for which the options below are used; or a controller of this model, fitted at any cost,
            whose concepts, setpoints, layers, weights and positions are kept.
        prompt: the whole prompt; strings or token ids.
        name, q, r, qf, layers, setpoint, positions: as in `fit`.

    Raises:
        InputError: an unusable prompt or option, or a contrast or controller of another model.
    """
    require(model, DIFFERENTIABLE, "adapt gains to a prompt")
    if isinstance(concept, Controller):
        concept.check_model(model)
        return readapted(model, concept, model.trace(tokenise(model, prompt)))
    if concept.fingerprint != model.fingerprint:
        raise InputError(f"the contrast is of {concept.model_name or 'another model'}, not of {model.name}")
    weights, chosen = Weights(q, r, qf), choose_layers(layers, concept)
    product = pull_back(model, [model.trace(tokenise(model, prompt))])
    feedback = feature_feedback(product, *aims(concept), weights, chosen)
    return assemble(concept, feedback, weights, 1, name, positions, "feature", setpoint)


def readapted(model: Differentiable, controller: Controller, trace: Trace) -> Controller:
    """The controller with gains for the feature cost at this trace."""
    product = pull_back(model, [trace])
    return Controller.combine(*(_readapted(one, product) for one in controller.split()))


def _readapted(controller: Controller, product: Product) -> Controller:
    """The same controller of one concept with gains for other Jacobians."""
    feedback = feature_feedback(
        product,
        controller.direction[:, :, 0],
        controller.setpoint[:, 0],
        controller.output_direction[:, 0],
        controller.weights,
        controller.active_layers,
    )
    gain = feedback.astype(np.float32)[:, :, None]
    return replace(controller, gain=gain, cost="feature", jacobian_prompts=1)
