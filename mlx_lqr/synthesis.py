"""From a model and two sets of prompts to a controller, in one call; and to one made for the very prompt in hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from mlx_lqr.algebra import LinearAlgebra, Matrix
from mlx_lqr.backends.base import Model, Progress, Trace
from mlx_lqr.contrast import Contrast, Layers, Prompt, choose_layers, contrast, tokenise
from mlx_lqr.controller import Controller, Cost, Positions, Setpoint, assemble, check_choice
from mlx_lqr.errors import InputError
from mlx_lqr.linearize import Jacobians, stream_jacobians, traces
from mlx_lqr.riccati import WEIGHT, Product, Weights, check_layers, feature_sweep, sweep


def fit(
    model: Model,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    concept: str = "concept",
    q: float = WEIGHT,
    r: float = 1.0,
    qf: float = WEIGHT,
    layers: Layers = None,
    cost: Cost = "state",
    setpoint: Setpoint = "centred",
    positions: Positions = "last",
    jacobian_prompts: int = 8,
    jacobians: Jacobians | None = None,
    progress: Progress | None = None,
) -> Controller:
    """Fit a controller: contrast the prompts, linearise the model, solve for the gains, keep what steering needs.

    Layer by layer from the last to the first, so that a few (d, d) matrices are held and not T of them; with
    cost="feature" none at all.

    Args:
        model: what `load` returned.
        positive, negative: prompts with and without the concept; strings or token ids.
        concept: the name under which the controller goes.
        q, r, qf: weights of state, control and final state; only q/r and qf/r matter. Larger q/r steers harder.
        layers: where control may act; by default "auto", where the feature tells the prompts apart, or the last third
            of the layers for two single prompts, which leave that open (`choose_layers`). "all": every layer.
        cost: "state" penalises any error of the state, "feature" that of the concept's feature alone (much cheaper);
            "adaptive" does the same, and our own decoding then makes the gains anew at every prompt.
        setpoint: "centred" counts from the level of the negative prompts to that of the positive ones (strength 1);
            "paper" asks for strength x mu_k, counted from zero. With either, strength 0 itself does not steer.
        positions: "last" steers the last prompt token and every generated token, "all" every prompt token too.
        jacobian_prompts: how many of the positive prompts to linearise at.
        jacobians: Jacobians of this model made before by `linearize`; then no prompt is linearised at.
        progress: called as progress(stage, done, total).

    Raises:
        InputError: unusable prompts or options, with what to do.
    """
    weights = Weights(q, r, qf)
    layers = _check_options(model.num_layers, layers, cost, setpoint, positions)
    if jacobians is not None and jacobians.fingerprint != model.fingerprint:
        raise InputError(f"the Jacobians are of {jacobians.model_name or 'another model'}, not of {model.name}")
    if jacobian_prompts < 1:
        raise InputError("jacobian_prompts must be at least 1")
    found = contrast(model, positive, negative, progress=progress)
    if jacobians is not None:
        return solve_controller(
            found,
            jacobians,
            concept=concept,
            q=q,
            r=r,
            qf=qf,
            layers=layers,
            cost=cost,
            setpoint=setpoint,
            positions=positions,
            algebra=model.algebra,
        )
    chosen = choose_layers(layers, found)
    nominal = positive[:jacobian_prompts]
    if cost != "state":
        feedback = _feature_feedback(
            _pull_back(model, traces(model, nominal)), *_aims(found), weights, chosen, progress
        )
    else:
        descending = stream_jacobians(model, nominal, lowest=chosen[0], progress=progress)
        feedback = _state_feedback(descending, found, weights, chosen, model.algebra)
    return assemble(found, feedback, weights, len(nominal), concept, positions, cost, setpoint)


def solve_controller(
    contrast: Contrast,
    jacobians: Jacobians,
    *,
    concept: str = "concept",
    q: float = WEIGHT,
    r: float = 1.0,
    qf: float = WEIGHT,
    layers: Layers = None,
    cost: Cost = "state",
    setpoint: Setpoint = "centred",
    positions: Positions = "last",
    algebra: LinearAlgebra | None = None,
) -> Controller:
    """A controller from what does not depend on the options: one contrast and one set of Jacobians serve many.

    Args:
        contrast, jacobians: of the same model.
        concept, q, r, qf, layers, cost, setpoint, positions: as in `fit`.
        algebra: where to solve, such as a model's `algebra`; by default NumPy.

    Raises:
        InputError: a contrast and Jacobians of different models, or unusable options.
    """
    weights = Weights(q, r, qf)
    layers = _check_options(len(contrast.direction), layers, cost, setpoint, positions)
    if jacobians.fingerprint != contrast.fingerprint:
        raise InputError("the Jacobians and the contrast are of different models: make both with the same one")
    chosen = choose_layers(layers, contrast)
    if cost != "state":
        feedback = _feature_feedback(lambda k, X: jacobians[k].T @ X, *_aims(contrast), weights, chosen)
    else:
        descending = ((k, jacobians[k]) for k in reversed(range(chosen[0], len(jacobians))))
        feedback = _state_feedback(descending, contrast, weights, chosen, algebra)
    return assemble(contrast, feedback, weights, jacobians.prompt_count, concept, positions, cost, setpoint)


def adapt(
    model: Model,
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
    if isinstance(concept, Controller):
        concept.check_model(model)
        return readapted(model, concept, model.trace(tokenise(model, prompt)))
    if concept.fingerprint != model.fingerprint:
        raise InputError(f"the contrast is of {concept.model_name or 'another model'}, not of {model.name}")
    weights, chosen = Weights(q, r, qf), choose_layers(layers, concept)
    pull_back = _pull_back(model, [model.trace(tokenise(model, prompt))])
    feedback = _feature_feedback(pull_back, *_aims(concept), weights, chosen)
    return assemble(concept, feedback, weights, 1, name, positions, "feature", setpoint)


def readapted(model: Model, controller: Controller, trace: Trace) -> Controller:
    """The controller with gains for the feature cost at this trace."""
    pull_back = _pull_back(model, [trace])
    return Controller.combine(*(_readapted(one, pull_back) for one in controller.split()))


def _check_options(T: int, layers: Layers, cost: Cost, setpoint: Setpoint, positions: Positions) -> Layers:
    """The layers, and an `InputError` for what can be seen to be wrong before anything is run."""
    check_choice("cost", cost, Cost)
    check_choice("setpoint", setpoint, Setpoint)
    check_choice("positions", positions, Positions)
    return layers if layers is None or (isinstance(layers, str) and layers == "auto") else check_layers(layers, T)


def _state_feedback(
    descending: Iterable[tuple[int, Matrix]],
    found: Contrast,
    weights: Weights,
    layers: tuple[int, ...],
    algebra: LinearAlgebra | None,
) -> Matrix:
    """g_k = K_k v_k for the state cost from the Jacobians (k, A_k), zero where there is no control: (T, d)"""
    unit = found.unit_direction
    feedback = np.zeros_like(unit)
    for k, gain in sweep(descending, weights, layers, algebra=algebra):
        feedback[k] = gain @ unit[k]
    return feedback


def _aims(found: Contrast) -> tuple[Matrix, Matrix, Matrix]:
    """v_k (T, d), mu_k (T,) and e_T (d,)"""
    return found.unit_direction, found.magnitude, found.output_direction


def _pull_back(model: Model, traces: Sequence[Trace]) -> Product:
    """(k, X) -> A_k' X with the Jacobians averaged over traces, none of which is ever formed."""

    def product(k: int, X: Matrix) -> Matrix:
        return np.mean([model.vjp(trace, k, X.T.astype(np.float32)) for trace in traces], axis=0).T

    return product


def _feature_feedback(
    pull_back: Product,
    unit: Matrix,
    magnitudes: Matrix,
    output_direction: Matrix,
    weights: Weights,
    layers: tuple[int, ...],
    progress: Progress | None = None,
) -> Matrix:
    """g_k for the feature cost from v_k (T, d), mu_k (T,) and e_T (d,), zero where there is no control: (T, d)"""
    from threadpoolctl import ThreadpoolController

    T = len(unit)
    output_magnitude = float(np.linalg.norm(output_direction))
    directions = np.vstack([unit, output_direction / (output_magnitude or 1.0)])
    feedback = np.zeros(unit.shape)
    # NumPy's own threads are of no use to these small products, and spin on the cores that the backend then waits for.
    with ThreadpoolController().select(internal_api="openblas").limit(limits=1):
        for k, gain in feature_sweep(pull_back, directions, np.append(magnitudes, output_magnitude), weights, layers):
            feedback[k] = gain
            if progress:
                progress("Gains", T - k, T - layers[0])
    return feedback


def _readapted(controller: Controller, pull_back: Product) -> Controller:
    """The same controller of one concept with gains for other Jacobians."""
    feedback = _feature_feedback(
        pull_back,
        controller.direction[:, :, 0],
        controller.setpoint[:, 0],
        controller.output_direction[:, 0],
        controller.weights,
        controller.active_layers,
    )
    gain = feedback.astype(np.float32)[:, :, None]
    return replace(controller, gain=gain, cost="feature", jacobian_prompts=1)
