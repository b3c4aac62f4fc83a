"""From a model and two sets of prompts to the steering of one of the methods that A-LQR is compared with.

e_k = mean+_k - mean-_k are differences of mean last-token activations, as in contrast.py. What block k adds or takes is
measured at its output, z_{k+1}: there the directions of index k + 1 stand. (S-PID alone measures at the block's input,
like A-LQR.)

| method | fitted |
|---|---|
| actadd: Turner et al. 2023 (arXiv 2308.10248); CAA, Rimsky et al. 2024 (2312.06681) | b_k = e_{k+1} |
| proportional (a first-order form of S-PID's law) | v_{k+1}, mu_{k+1} |
| ablation: Arditi et al. 2024 (2406.11717) | one v_l for every block |
| spid: baseline of 2604.19018 | v_k, mu_k |
| mean-act: Rodriguez et al. 2024 (2410.23054) | b_k = mean+ - mean-, the negative prompts steered before block k |
| linear-act: the same | least squares of the sorted activations of each neuron, steered likewise |
| pid-act: Nguyen et al. 2025 (2510.04309) | b_k = kp r_k + ki sum_{j<k} r_j + kd (r_k - r_{k-1}), r_k as in mean-act |
| iti: Li et al. 2023 (2306.03341) | b_k = O_k [sigma_h theta_h], the heads h those that a probe tells apart best |
| odesteer: Zhao et al. 2026 (2602.17560) | the log-density ratio of the prompts' z_{k+1}, at one block |
| angular: Vu and Nguyen 2025 (2510.26243) | the plane of a concept's direction and the main axis of all layers' |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from mlx_lqr.backends.capabilities import HEAD_RECORDER, require
from mlx_lqr.backends.protocol import Float32, Progress, Recorder
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.contrast import Contrast, activations, contrast_of, unit
from mlx_lqr.lqr.controller import Positions
from mlx_lqr.lqr.layers import Layers, check_layers, separating
from mlx_lqr.lqr.prompts import Prompt, tokenise_sets
from mlx_lqr.methods.baseline import METHODS, Baseline, MethodName
from mlx_lqr.methods.density_ratio import gradient_flow
from mlx_lqr.methods.iti import intervention
from mlx_lqr.methods.laws import law_of

RESET_EVERY = 10
"""Layers after which S-PID's integral starts again from zero."""
MIDDLE_ALONE = ("actadd", "odesteer", "angular", "adaptive-angular")
"""Methods that by default act at one layer: ActAdd and ODESteer by their papers; to turn the residual stream itself at
every block, and not the outputs of norms as the paper does, left no text of SmolLM2."""


def fit_baseline(
    model: Recorder,
    method: MethodName,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    concept: str = "concept",
    layers: Layers = None,
    positions: Positions | None = None,
    source_layer: int | None = None,
    incremental: bool = True,
    heads: int | None = None,
    numbers: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Baseline:
    """Fit the steering of a baseline method; `generate`, `steer`, chat and the rest take it like a controller.

    What the strength is: for actadd, mean-act, pid-act and linear-act the share of the way from the negative to the
    positive prompts (1 is all of it); for proportional and spid the setpoint in multiples of mu_k, as for
    a controller; for ablation the share that is taken away; for the angular methods the angle in degrees between the
    activation's part in the plane and the concept's direction; for iti by how many standard deviations a head's output
    is moved (the paper's alpha, 15 for a LLaMA of 7B); for odesteer how far it goes, in distances between the means.
    For every method 0 is not steered; the concept's direction itself is an angle of 360.

    Args:
        model: what `load` returned.
        method: one of `METHODS`.
        positive, negative: prompts with and without the concept; strings or token ids.
        concept: the name under which the steering goes.
        layers: the blocks whose output is changed, or from whose heads iti may choose; by default "all", and for
            `MIDDLE_ALONE` the middle one. "auto": those where what the method measures tells the prompts apart
            (`contrast.choose_layers`); of these, for `MIDDLE_ALONE`, the best; for iti, whose probes choose, all.
        positions: "last" steers the last prompt token and every generated one, "all" every prompt token too; by default
            what the method's paper does.
        source_layer: for ablation, the one layer l whose direction v_l is ablated everywhere; by default the one at
            three fifths of the depth. (The paper tries all of them on a task. To ablate at every block a direction of
            its own takes so much that no text is left.)
        incremental: for mean-act, linear-act and pid-act, whether a layer is fitted with those before it steered (the
            papers' way, a pass over the negative prompts for each layer), or all at once on the unsteered model.
        heads: for iti, how many attention heads of the model are moved; by default the share `HEADS` of them.
        numbers: those of the method, by name: kp of proportional; kp, ki, kd of spid and pid-act.
        progress: called as progress(stage, done, total).

    Raises:
        InputError: no such method, an option that it does not have, or unusable prompts.
    """
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}: choose one of {', '.join(METHODS)}")
    known = METHODS[method]
    chosen_numbers = check_options(
        method, numbers or {}, source_layer=source_layer, incremental=incremental, heads=heads
    )
    T = model.num_layers
    automatic = isinstance(layers, str) and layers == "auto"
    given = () if automatic else check_layers([T // 2] if method in MIDDLE_ALONE and layers is None else layers, T)
    if source_layer is not None and not 0 <= source_layer <= T:
        raise InputError(f"source_layer must be between 0 and {T}, not {source_layer}")
    blank = Baseline(
        method=method,
        tensors={},
        numbers=chosen_numbers,
        active_layers=(),
        concepts=(concept,),
        positions=positions or known.positions,
        model_name=model.name,
        fingerprint=model.fingerprint,
        num_layers=T,
        hidden_size=model.hidden_size,
        prompt_counts=((len(positive), len(negative)),),
    )
    token_sets = tokenise_sets(model, positive, negative)
    if method == "iti":
        recorder = require(model, HEAD_RECORDER, "record attention heads, as iti does")
        return intervention(recorder, blank, given or check_layers("all", T), *token_sets, heads, progress)
    residuals = activations(model, *token_sets, progress)
    found = contrast_of(model, *residuals)
    chosen = _separating(method, found) if automatic else given
    if method in ("mean-act", "linear-act", "pid-act"):
        steered = partial(model.residuals, token_sets[1], steer_all=blank.positions == "all")
        return _transport(blank, chosen, *residuals, steered if incremental else None, progress)
    if method == "odesteer":
        if len(chosen) != 1:
            raise InputError("odesteer acts at one layer: choose one, such as --layers 14")
        return gradient_flow(blank, chosen[0], *(found[:, chosen[0] + 1] for found in residuals))
    before, after = _directions(found)
    active = np.zeros((T, 1), np.float32)
    active[list(chosen)] = 1
    tensors: dict[str, Float32]
    if method == "actadd":
        tensors = {"shift": (active * after)[:, :, None]}
    elif method == "ablation":
        source = 3 * T // 5 if source_layer is None else source_layer
        single = unit(np.vstack([before, after[-1:]])[source])
        if not single.any():
            raise InputError(f"layer {source} does not tell the prompts apart: choose another source layer")
        tensors = {"direction": active * single}
    elif method in ("proportional", "spid"):
        measured = before if method == "spid" else after
        tensors = {"direction": active * unit(measured), "setpoint": np.linalg.norm(measured, axis=1) * active[:, 0]}
        if method == "spid":
            tensors["kept"] = (np.arange(T) % RESET_EVERY > 0).astype(np.float32)
    else:
        tensors = {"plane": _plane(after)}
    return replace(blank, tensors=tensors, active_layers=chosen)


def check_options(
    method: MethodName,
    numbers: Mapping[str, float],
    *,
    source_layer: int | None = None,
    incremental: bool = True,
    heads: int | None = None,
) -> dict[str, float]:
    """The method's numbers, with its own where nothing is given.

    Raises:
        InputError: an option that the method does not have, or a number of heads that is none.
    """
    known = METHODS[method]
    for name in numbers:
        if name not in known.numbers:
            having = ", ".join(other for other, entry in METHODS.items() if name in entry.numbers)
            raise InputError(f"{method} has no {name}" + (f": it belongs to {having}" if having else ""))
    if source_layer is not None and method != "ablation":
        raise InputError(f"{method} has no source layer: it belongs to ablation")
    if not incremental and method not in ("mean-act", "linear-act", "pid-act"):
        raise InputError(f"{method} is fitted in one pass anyway: leave that option out")
    if heads is not None and method != "iti":
        raise InputError(f"{method} chooses no heads: that belongs to iti")
    if heads is not None and heads < 1:
        raise InputError(f"heads must be at least 1, not {heads}")
    return {**known.numbers, **numbers}


def _separating(method: MethodName, found: Contrast) -> tuple[int, ...]:
    """The blocks at which a method's own place of measurement, mostly the output, tells the prompts apart."""
    separation = found.separation[:-1] if method == "spid" else found.separation[1:]
    return (int(np.argmax(separation)),) if method in MIDDLE_ALONE else separating(separation)


def _directions(found: Contrast) -> tuple[Float32, Float32]:
    """e_k of z_0..z_{T-1}, and of z_1..z_T: (T, d) each."""
    return found.direction, np.vstack([found.direction[1:], found.output_direction[None]])


def _plane(directions: Float32) -> Float32:
    """An orthonormal basis of the plane of rotation (d, 2), the same for all layers.

    Its first axis is the direction that is most like those of the other layers (by their mean cosine), its second the
    main axis (first principal component, about the mean) of all of them, without its part along the first. Directions
    are taken at length 1, or the last layers, where the residual stream is longest, would decide alone.

    Raises:
        InputError: the directions of all layers are one, so that there is no plane.
    """
    units = unit(directions).astype(np.float64)
    units = units[units.any(axis=1)]
    first = units[np.argmax((units @ units.T).mean(axis=1))]
    spread = np.linalg.svd(units - units.mean(axis=0), full_matrices=False)
    second = spread[2][0] - (spread[2][0] @ first) * first
    if spread[1][0] < 1e-6 or np.linalg.norm(second) < 1e-6:
        raise InputError("the directions of all layers are the same: there is no plane to rotate in")
    return np.stack([first, second / np.linalg.norm(second)], axis=1).astype(np.float32)


def _transport(
    blank: Baseline,
    layers: Sequence[int],
    target: Float32,
    source: Float32,
    steered: Callable[..., Float32] | None,
    progress: Progress | None,
) -> Baseline:
    """Fit the maps from `source`, the negative prompts' activations (n, T + 1, d), to `target`, the positive ones'
    (m, T + 1, d), from the first layer to the last.

    Args:
        steered: (law=) -> the source under a law, where each layer is fitted with those before it steered.
    """
    T, d = blank.num_layers, blank.hidden_size
    linear = blank.method == "linear-act"
    tensors = {"scale": np.ones((T, d), np.float32), "shift": np.zeros((T, d), np.float32)}
    total, last = np.zeros(d), np.zeros(d)
    fitted = blank
    for done, k in enumerate(layers):
        if steered is not None and done:
            source = steered(law=law_of(fitted))
        if linear:
            tensors["scale"][k], tensors["shift"][k] = linear_map(source[:, k + 1], target[:, k + 1])
        else:
            error = target[:, k + 1].mean(axis=0, dtype=np.float64) - source[:, k + 1].mean(axis=0, dtype=np.float64)
            shift = error
            if blank.method == "pid-act":
                change = error - last if done else np.zeros(d)
                shift = blank.numbers["kp"] * error + blank.numbers["ki"] * total + blank.numbers["kd"] * change
                total, last = total + error, error
            tensors["shift"][k] = shift
        kept = dict(tensors) if linear else {"shift": tensors["shift"][:, :, None]}
        fitted = replace(blank, tensors=kept, active_layers=tuple(layers[: done + 1]))
        if progress:
            progress("Transport", done + 1, len(layers))
    return fitted


def linear_map(source: Float32, target: Float32) -> tuple[Float32, Float32]:
    """For each of d neurons the increasing map a -> scale a + shift that takes the activations of `source` (n, d) to
    those of `target` (m, d), both sorted, with the least squared error: scale and shift, (d,) each.

    Sets of different sizes are compared at as many quantiles as the larger has activations. The mean goes onto the
    mean; a neuron that is constant is only shifted.
    """
    count = max(len(source), len(target))
    at = (np.arange(count) + 0.5) / count
    a, b = (np.quantile(rows.astype(np.float64), at, axis=0, method="hazen") for rows in (source, target))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    spread = (a * a).sum(axis=0)
    scale = np.divide((a * b).sum(axis=0), spread, out=np.ones_like(spread), where=spread > 1e-12)
    shift = target.mean(axis=0, dtype=np.float64) - scale * source.mean(axis=0, dtype=np.float64)
    return scale.astype(np.float32), shift.astype(np.float32)
