"""A model and two sets of prompts -> a controller, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlx_lqr.backends.capabilities import DIFFERENTIABLE, require
from mlx_lqr.backends.protocol import Differentiable, LinearAlgebra, Progress, Trace
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.contrast import Contrast, contrast
from mlx_lqr.lqr.controller import (
    FEEDBACK,
    Controller,
    Cost,
    Positions,
    Readout,
    Setpoint,
    assemble,
    check_choice,
    check_feedback,
)
from mlx_lqr.lqr.gains import PUSH, Push, directions_of, feature_gains, pull_back, side_of, state_gains
from mlx_lqr.lqr.layers import Layers, authority, check_layers, choose_layers, effective, is_auto
from mlx_lqr.lqr.linearize import Jacobians, stream_jacobians, traces
from mlx_lqr.lqr.prompts import Prompt
from mlx_lqr.lqr.riccati import WEIGHT, Weights


def fit(
    model: Differentiable,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    concept: str = "concept",
    q: float = WEIGHT,
    r: float = 1.0,
    qf: float = WEIGHT,
    layers: Layers = None,
    cost: Cost = "feature",
    setpoint: Setpoint = "centred",
    readout: Readout = "discriminant",
    feedback: float = FEEDBACK,
    push: Push = PUSH,
    positions: Positions = "last",
    jacobian_prompts: int = 8,
    jacobians: Jacobians | None = None,
    progress: Progress | None = None,
    on_contrast: Callable[[Contrast], None] | None = None,
) -> Controller:
    """Fit a controller: contrast the prompts, linearise the model, solve for the gains, keep what steering needs.

    Holds no (d, d) matrix; with cost="state" a few at a time, from the last layer to the first.

    Args:
        model: what `load` returned.
        positive, negative: prompts with and without the concept; strings or token ids.
        concept: the controller's name for it.
        q, r, qf: weights of state, control and final state; only q/r and qf/r matter. Larger q/r steers harder.
        layers: where control may act. The default is "auto", where a push for the concept works (`choose_layers`).
            "all" is every layer.
        cost: "feature" penalises the error of the concept's feature, "state" any error of the state, which takes far
            longer and does no better (docs/comparison.md). "adaptive" is the feature cost too, but our own decoding
            recomputes the gains for each prompt.
        setpoint: "centred" counts from the level of the negative prompts to that of the positive ones (strength 1);
            "paper" asks for strength x mu_k, counted from zero. With either, strength 0 itself does not steer.
        readout: "discriminant" reads the feature by Fisher's linear discriminant of the two sets, which answers less to
            what has nothing to do with the concept; "direction" by the direction itself, as the paper does.
        feedback: the share f of the push that the feature takes back as it rises (0 < f <= 1): u_k = (strength x mu_k -
            f (w_k . z_k - offset_k)) K_k v_k. 1 is the paper's regulator, which holds the feature at its setpoint. With
            less the push varies less from token to token, which gets more of the concept for the same divergence.
        push: "concept" pushes along the concept's own direction v_{k+1} at the block's output alone; "free" in whatever
            direction costs least, as the paper does.
        positions: "last" steers the last prompt token and every generated token, "all" every prompt token too.
        jacobian_prompts: how many of the positive prompts to linearise at.
        jacobians: Jacobians of this model from `linearize`; then `jacobian_prompts` is not used.
        progress: called as progress(stage, done, total).
        on_contrast: called with the prompts' `Contrast`, from which the controller is made.

    Raises:
        InputError: unusable prompts or options; the message says what to do.
    """
    require(model, DIFFERENTIABLE, "fit controllers")
    weights = Weights(q, r, qf)
    layers = _check_options(model.num_layers, layers, cost, setpoint, readout, positions, feedback, push)
    if jacobians is not None and jacobians.fingerprint != model.fingerprint:
        raise InputError(f"the Jacobians are of {jacobians.model_name or 'another model'}, not of {model.name}")
    if jacobian_prompts < 1:
        raise InputError("jacobian_prompts must be at least 1")
    prompt_contrast = contrast(model, positive, negative, progress=progress)
    if on_contrast is not None:
        on_contrast(prompt_contrast)
    if jacobians is not None:
        return solve_controller(
            prompt_contrast,
            jacobians,
            concept=concept,
            q=q,
            r=r,
            qf=qf,
            layers=layers,
            cost=cost,
            setpoint=setpoint,
            readout=readout,
            feedback=feedback,
            push=push,
            positions=positions,
            algebra=model.algebra,
        )
    nominal = positive[:jacobian_prompts]
    points = traces(model, nominal)
    chosen = layers_of(model, layers, prompt_contrast, points)
    if cost != "state":
        product = pull_back(model, points)
        directions = directions_of(prompt_contrast)
        gains = feature_gains(product, *directions, weights, chosen, progress, side=side_of(model), push=push)
    else:
        descending = stream_jacobians(model, points, lowest=chosen[0], progress=progress)
        gains = state_gains(descending, prompt_contrast, weights, chosen, model.algebra, push)
    return assemble(
        prompt_contrast, gains, weights, len(nominal), concept, positions, cost, setpoint, readout, feedback, push
    )


def solve_controller(
    contrast: Contrast,
    jacobians: Jacobians,
    *,
    concept: str = "concept",
    q: float = WEIGHT,
    r: float = 1.0,
    qf: float = WEIGHT,
    layers: Layers = None,
    cost: Cost = "feature",
    setpoint: Setpoint = "centred",
    readout: Readout = "discriminant",
    feedback: float = FEEDBACK,
    push: Push = PUSH,
    positions: Positions = "last",
    algebra: LinearAlgebra | None = None,
) -> Controller:
    """A controller from a contrast and Jacobians. Both can be used again for other options.

    Args:
        contrast, jacobians: of the same model.
        concept, q, r, qf, layers, cost, setpoint, readout, feedback, push, positions: as in `fit`.
        algebra: where to solve, such as a model's `algebra`; by default NumPy.

    Raises:
        InputError: the contrast and the Jacobians are of different models, or an option cannot be used.
    """
    weights = Weights(q, r, qf)
    layers = _check_options(len(contrast.direction), layers, cost, setpoint, readout, positions, feedback, push)
    if jacobians.fingerprint != contrast.fingerprint:
        raise InputError("the Jacobians and the contrast are of different models: make both with the same one")
    chosen = choose_layers(layers, contrast, jacobians)
    if cost != "state":
        directions = directions_of(contrast)
        gains = feature_gains(jacobians.pull_back, *directions, weights, chosen, side=jacobians.side, push=push)
    else:
        descending = ((k, jacobians[k]) for k in reversed(range(chosen[0], len(jacobians))))
        gains = state_gains(descending, contrast, weights, chosen, algebra, push)
    return assemble(
        contrast, gains, weights, jacobians.prompt_count, concept, positions, cost, setpoint, readout, feedback, push
    )


AUTHORITY_PROMPTS = 2
"""How many of the nominal prompts the authority of layers is measured at. It hardly differs from prompt to prompt."""


def layers_of(model: Differentiable, layers: Layers, contrast: Contrast, points: Sequence[Trace]) -> tuple[int, ...]:
    """`choose_layers` for a model that is at hand, at some of these traces."""
    if not is_auto(layers):
        return choose_layers(layers, contrast)
    product = pull_back(model, points[:AUTHORITY_PROMPTS])
    return effective(contrast, authority(contrast, product, side_of(model)))


def _check_options(
    T: int,
    layers: Layers,
    cost: Cost,
    setpoint: Setpoint,
    readout: Readout,
    positions: Positions,
    feedback: float,
    push: Push,
) -> Layers:
    """The layers as given or checked. Raises `InputError` for options that are wrong whatever the prompts are."""
    check_choice("cost", cost, Cost)
    check_choice("setpoint", setpoint, Setpoint)
    check_choice("readout", readout, Readout)
    check_choice("positions", positions, Positions)
    check_choice("push", push, Push)
    check_feedback(feedback)
    return layers if is_auto(layers) else check_layers(layers, T)
