"""A controller fitted to one prompt: gains for the feature cost, linearised at that prompt's last token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mlx_lqr.backends.capabilities import DIFFERENTIABLE, require
from mlx_lqr.backends.protocol import Differentiable, Trace
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.contrast import Contrast
from mlx_lqr.lqr.controller import FEEDBACK, Controller, Positions, Readout, Setpoint, assemble
from mlx_lqr.lqr.fit import layers_of
from mlx_lqr.lqr.gains import PUSH, Push, directions_of, feature_gains, pull_back, side_of
from mlx_lqr.lqr.layers import Layers
from mlx_lqr.lqr.prompts import Prompt, tokenise
from mlx_lqr.lqr.riccati import WEIGHT, Product, Weights


def adapt(
    model: Differentiable,
    contrast: Contrast | Controller,
    prompt: Prompt,
    *,
    concept: str = "concept",
    q: float = WEIGHT,
    r: float = 1.0,
    qf: float = WEIGHT,
    layers: Layers = None,
    setpoint: Setpoint = "centred",
    readout: Readout = "discriminant",
    feedback: float = FEEDBACK,
    push: Push = PUSH,
    positions: Positions = "last",
) -> Controller:
    """A controller whose gains are computed at the last token of the prompt that it will steer (feature cost).

    Args:
        model: what `load` returned.
        contrast: of this model, from `contrast`; the options below then apply. Or a controller of this model, fitted
            with any cost: it keeps its concepts, setpoints, layers, weights and positions, and the options are not
            used.
        prompt: the whole prompt; a string or token ids.
        concept, q, r, qf, layers, setpoint, readout, feedback, push, positions: as in `fit`.

    Raises:
        InputError: an unusable prompt or option, or a contrast or controller of another model.
    """
    require(model, DIFFERENTIABLE, "adapt gains to a prompt")
    if isinstance(contrast, Controller):
        contrast.check_model(model)
        return adapt_at(model, contrast, model.trace(tokenise(model, prompt)))
    if contrast.fingerprint != model.fingerprint:
        raise InputError(f"the contrast is of {contrast.model_name or 'another model'}, not of {model.name}")
    weights, point = Weights(q, r, qf), model.trace(tokenise(model, prompt))
    chosen, product = layers_of(model, layers, contrast, [point]), pull_back(model, [point])
    gains = feature_gains(product, *directions_of(contrast), weights, chosen, side=side_of(model), push=push)
    return assemble(contrast, gains, weights, 1, concept, positions, "feature", setpoint, readout, feedback, push)


def adapt_at(model: Differentiable, controller: Controller, trace: Trace) -> Controller:
    """The controller with gains for the feature cost, recomputed at this trace."""
    product, side = pull_back(model, [trace]), side_of(model)
    return Controller.combine(*(_with_gains_for(product, side, one) for one in controller.split()))


def _with_gains_for(product: Product, side: int, controller: Controller) -> Controller:
    """A controller of one concept with gains for the Jacobians behind `product`."""
    gains = feature_gains(
        product,
        controller.direction[:, :, 0],
        controller.magnitude[:, 0],
        controller.output_direction[:, 0],
        controller.weights,
        controller.active_layers,
        side=side,
        push=controller.pushes[0],
    )
    gain = (controller.shares[0] * gains).astype(np.float32)[:, :, None]
    return replace(controller, gain=gain, cost="feature", jacobian_prompts=1)
