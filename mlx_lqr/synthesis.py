"""From a model and two sets of prompts to a controller, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mlx_lqr.backends.base import Model, Progress
from mlx_lqr.contrast import Prompt, contrast
from mlx_lqr.controller import Controller, Positions, assemble
from mlx_lqr.errors import InputError
from mlx_lqr.linearize import Jacobians, stream_jacobians
from mlx_lqr.riccati import Matrix, Weights, check_layers, sweep


def fit(
    model: Model,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    concept: str = "concept",
    q: float = 0.1,
    r: float = 1.0,
    qf: float = 0.1,
    layers: Iterable[int] | None = None,
    positions: Positions = "last",
    jacobian_prompts: int = 8,
    jacobians: Jacobians | None = None,
    progress: Progress | None = None,
) -> Controller:
    """Fit a controller: contrast the prompts, linearise the model, solve for the gains, keep what steering needs.

    Layer by layer from the last to the first, so that a few (d, d) matrices are held and not T of them.

    Args:
        model: what `load` returned.
        positive, negative: prompts with and without the concept; strings or token ids.
        concept: the name under which the controller goes.
        q, r, qf: weights of state, control and final state; only q/r and qf/r matter. Larger q/r steers harder.
        layers: where control may act; default everywhere.
        positions: "last" steers the last prompt token and every generated token, "all" every prompt token too.
        jacobian_prompts: how many of the positive prompts to linearise at.
        jacobians: Jacobians of this model made before by `linearize`; then no prompt is linearised at.
        progress: called as progress(stage, done, total).

    Raises:
        InputError: unusable prompts or options, with what to do.
    """
    weights = Weights(q, r, qf)
    chosen = check_layers(layers, model.num_layers)
    if jacobians is not None and jacobians.fingerprint != model.fingerprint:
        raise InputError(f"the Jacobians are of {jacobians.model_name or 'another model'}, not of {model.name}")
    if jacobian_prompts < 1:
        raise InputError("jacobian_prompts must be at least 1")
    found = contrast(model, positive, negative, progress=progress)
    descending: Iterable[tuple[int, Matrix]]
    if jacobians is not None:
        count = jacobians.prompt_count
        descending = ((k, jacobians[k]) for k in reversed(range(chosen[0], len(jacobians))))
    else:
        nominal = positive[:jacobian_prompts]
        count = len(nominal)
        descending = stream_jacobians(model, nominal, lowest=chosen[0], progress=progress)
    unit = found.unit_direction
    feedback = np.zeros_like(unit)
    for k, gain in sweep(descending, weights, chosen):
        feedback[k] = gain @ unit[k]
    return assemble(found, feedback, weights, count, concept, positions)
