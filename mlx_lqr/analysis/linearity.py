"""Are the blocks locally linear? |phi_k(z + dz) - phi_k(z) - A_k dz| / |A_k dz| against |dz|; are the A_k alike?

A_k is the Jacobian at the prompt's last token. The trust region of a layer along a direction is the size at which that
error passes 10 %. Sizes are multiples of |z_k|, the length of the residual stream, which grows from layer to layer.

Where blocks hand on more than z at a token, what is compared is z_{k+1} all the same, and the spectra are those of
d z_{k+1} / d z_k. Only a displacement by a controller also moves what layers below have handed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mlx_lqr.analysis.inputs import check_seed, check_single, check_strengths
from mlx_lqr.analysis.rollout import roll_out
from mlx_lqr.analysis.spectra import (
    dominant_modes,
    gaussian_modes,
    mean_of_pairs,
    rotated,
    similarity_matrix,
    spectral_similarity,
)
from mlx_lqr.backends.capabilities import DIFFERENTIABLE, require
from mlx_lqr.backends.protocol import Differentiable, Float32, Progress, Trace
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.linearize import traces
from mlx_lqr.lqr.prompts import Prompt

TOLERANCE = 0.1
"""The relative error at which a trust region ends."""
SIZES = 10 ** np.linspace(-2.5, 0.5, 13)
"""|dz| / |z_k|. Smaller steps would measure the rounding of float32 activations."""
MODES = (1, 2, 4, 8, 16, 32)
"""Numbers m of dominant modes compared."""
RANDOM_DIRECTIONS = 4


@dataclass(frozen=True, eq=False)
class Applied:
    """What a controller does at the prompts, to compare with the trust regions; S strengths."""

    strengths: tuple[float, ...]
    feature_error: Float32
    """(n, S, T): f |alpha_k| for the share f of the feedback: the size of dz_k that the law assumes, unscaled"""
    push: Float32
    """(n, S, T): |u_k|, which is added to the input of block k + 1"""
    displacement: Float32
    """(n, S, T): |z_k - z0_k|, the change at the input of layer k by all control below it"""
    displacement_error: Float32
    """(n, S, T): the linearisation error at that displacement; NaN if there is no displacement"""


@dataclass(frozen=True, eq=False)
class Linearity:
    """What `linearity` measured at the last tokens of n prompts, on a model of T blocks of width d."""

    model_name: str
    prompt_count: int
    concept: str
    """Empty if no controller was given"""
    norm: Float32
    """(n, T): |z_k|"""
    magnitude: Float32
    """(T,): mu_k of the concept, NaN without one"""
    sizes: Float32
    """(s,): |dz| / |z_k|"""
    error: dict[str, Float32]
    """direction -> (n, T, s): the linearisation error, the worst of the directions of a kind. Kinds: "concept", along
    +-v_k; "push", along +-g_{k-1}, which the layer before adds (NaN where it adds nothing); "random"."""
    trust: dict[str, Float32]
    """direction -> (n, T): the size, in multiples of |z_k|, at which the error passes 10 %; infinite if no size tried
    passes it"""
    singular_values: Float32
    """(3, T, d): least, median and largest over the prompts"""
    similarity: Float32
    """(T, n, n): spectral similarity of the prompts' Jacobians at `modes` modes"""
    modes: int
    similarity_by_modes: Float32
    """(T, M): mean over pairs of prompts, for each number of modes in `mode_counts`"""
    rotated_by_modes: Float32
    """(T, M): the same for matrices of these spectra and random directions"""
    gaussian_by_modes: Float32
    """(M,): the same for matrices of independent normal entries"""
    mode_counts: tuple[int, ...]
    applied: Applied | None

    def trust_radius(self, direction: str, quantile: float = 0.5) -> Float32:
        """(T,): a quantile over prompts of the trust region, in the residual stream's units; it may be infinite."""
        radius = self.trust[direction] * self.norm
        return np.quantile(radius, quantile, axis=0, method="lower")


def linearity(
    model: Differentiable,
    prompts: Sequence[Prompt],
    controller: Controller | None = None,
    *,
    strengths: Sequence[float] = (1.0, 2.0, 3.0),
    modes: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Linearity:
    """Measure how linear the blocks are at the last token of each prompt (at most 32 tokens of it).

    Goes layer by layer: only one layer's Jacobians, and the dominant modes of all prompts, are in memory at a time.

    Args:
        model: what `load` returned.
        prompts: at least two, which are compared with each other.
        controller: of one concept; its directions, and what it does at `strengths`, are then measured too.
        modes: the number of dominant modes in `Linearity.similarity`.
        seed: of the random directions and baselines.
        progress: called as progress("Layers", done, total).

    Raises:
        InputError: fewer than two prompts, an unusable prompt, or a controller of another model or of several concepts.
    """
    require(model, DIFFERENTIABLE, "measure how linear its blocks are")
    if isinstance(prompts, str) or len(prompts) < 2:
        raise InputError("linearity compares prompts: give at least two")
    if controller is not None:
        check_single(controller, model)
        check_strengths(strengths)
    if not 1 <= modes <= model.hidden_size:
        raise InputError(f"modes must be between 1 and {model.hidden_size}, the model's width, not {modes}")
    check_seed(seed)
    random = np.random.default_rng(seed)
    points = traces(model, prompts)
    n, T, d = len(points), model.num_layers, model.hidden_size
    counts = tuple(m for m in sorted({*MODES, modes}) if m <= d)
    norm = np.stack([np.linalg.norm(point.residual[:-1], axis=1) for point in points])
    kinds = ("concept", "push", "random") if controller is not None else ("random",)
    error = {kind: np.full((n, T, len(SIZES)), np.nan, np.float32) for kind in kinds}
    spectra = np.empty((3, T, d), np.float32)
    similarity = np.empty((T, n, n), np.float32)
    by_modes, by_modes_rotated = np.empty((2, T, len(counts)), np.float32)
    for k in range(T):
        values, scaled = [], []
        for i, point in enumerate(points):
            A = _finite(model.jacobian(point, k), k)[:d, :d]
            S, modes_of_point = dominant_modes(A, counts[-1])
            values.append(S)
            scaled.append(modes_of_point)
            for kind, directions in _directions(controller, k, d, random).items():
                error[kind][i, k] = linearisation_error(model, point, k, directions, SIZES * norm[i, k])
            if progress:
                progress("Layers", k * n + i + 1, T * n)
        spectra[:, k] = np.quantile(values, (0, 0.5, 1), axis=0)
        similarity[k] = similarity_matrix(scaled, modes)
        for j, m in enumerate(counts):
            by_modes[k, j] = mean_of_pairs(similarity_matrix(scaled, m))
            pairs = [(rotated(a[:, :m], random), b[:, :m]) for a, b in pairwise(scaled)]
            by_modes_rotated[k, j] = np.mean([spectral_similarity(*pair) for pair in pairs])
    gaussian = [gaussian_modes(d, counts[-1], random) for _ in range(3)]
    return Linearity(
        model_name=model.name,
        prompt_count=n,
        concept=controller.concepts[0] if controller is not None else "",
        norm=norm,
        magnitude=controller.magnitude[:, 0] if controller is not None else np.full(T, np.nan, np.float32),
        sizes=SIZES.astype(np.float32),
        error=error,
        trust={kind: trust_region(SIZES.astype(np.float32), errors) for kind, errors in error.items()},
        singular_values=spectra,
        similarity=similarity,
        modes=modes,
        similarity_by_modes=by_modes,
        rotated_by_modes=by_modes_rotated,
        gaussian_by_modes=np.array([mean_of_pairs(similarity_matrix(gaussian, m)) for m in counts], np.float32),
        mode_counts=counts,
        applied=_applied(model, prompts, controller, strengths, progress) if controller is not None else None,
    )


def linearisation_error(
    model: Differentiable, trace: Trace, layer: int, directions: Float32, sizes: Float32
) -> Float32:
    """|phi(z + dz) - phi(z) - A dz| / |A dz| for dz = size x direction, the worst over the directions: (s,).

    Args:
        directions: unit vectors (n, d); without any the error is NaN.
        sizes: |dz| in the residual stream's units (s,).
    """
    if not len(directions):
        return np.full(len(sizes), np.nan, np.float32)
    units = np.pad(directions, ((0, 0), (0, model.state_size - directions.shape[1])))
    steps = (np.asarray(sizes, np.float32)[:, None, None] * units).reshape(-1, units.shape[1])
    error = displacement_error(model, trace, layer, trace.state[layer], steps, model.jvp(trace, layer, units))
    return np.max(error.reshape(len(sizes), -1), axis=1)


def displacement_error(
    model: Differentiable, trace: Trace, layer: int, s: Float32, steps: Float32, linear: Float32 | None = None
) -> Float32:
    """The linearisation error of each step ds, the rows of `steps` (n, d + m), from s: (n,); NaN where A ds is zero.

    Args:
        linear: A w (u, d + m) of unit vectors w; step i lies along w number i mod u. By default A ds is computed for
            every step.
    """
    d = model.hidden_size
    values = model.block(trace, layer, np.vstack([s, s + steps]))[:, :d].astype(np.float64)
    if linear is None:
        predicted = model.jvp(trace, layer, steps)[:, :d].astype(np.float64)
    else:
        lengths = np.linalg.norm(steps, axis=1)[:, None]
        predicted = np.tile(linear[:, :d], (len(steps) // len(linear), 1)) * lengths
    size = np.linalg.norm(predicted, axis=1)
    remainder = np.linalg.norm(values[1:] - values[0] - predicted, axis=1)
    return np.divide(remainder, size, out=np.full(len(steps), np.nan), where=size > 0).astype(np.float32)


def trust_region(sizes: Float32, error: Float32, tolerance: float = TOLERANCE) -> Float32:
    """The size at which the error (..., s) first passes `tolerance`, by interpolation of the logarithms: (...).

    If the smallest size is already beyond it, it is extrapolated, with the error proportional to the size (second
    order). If no size is, it is infinite. NaN if the error is NaN.
    """
    logs, errors = np.log(np.asarray(sizes, np.float64)), np.log(np.maximum(np.asarray(error, np.float64), 1e-12))
    flat = errors.reshape(-1, len(logs))
    radius = np.full(len(flat), np.inf)
    for row, curve in enumerate(flat):
        beyond = np.flatnonzero(curve > np.log(tolerance))
        if np.isnan(curve).any():
            radius[row] = np.nan
        elif beyond.size and (j := beyond[0]) == 0:
            radius[row] = np.exp(logs[0] + np.log(tolerance) - curve[0])
        elif beyond.size:
            share = (np.log(tolerance) - curve[j - 1]) / (curve[j] - curve[j - 1])
            radius[row] = np.exp(logs[j - 1] + share * (logs[j] - logs[j - 1]))
    return radius.reshape(errors.shape[:-1]).astype(np.float32)


def _directions(
    controller: Controller | None, layer: int, width: int, random: np.random.Generator
) -> dict[str, Float32]:
    """Unit vectors (n, d) of every kind at the input of a block; n is 0 if there is no direction."""
    isotropic = random.standard_normal((RANDOM_DIRECTIONS, width)).astype(np.float32)
    directions = {"random": isotropic / np.linalg.norm(isotropic, axis=1, keepdims=True)}
    if controller is not None:
        before = controller.gain[layer - 1, :, 0] if layer else np.zeros(width, np.float32)
        for kind, vector in (("concept", controller.direction[layer, :, 0]), ("push", before)):
            length = np.linalg.norm(vector)
            directions[kind] = np.stack([vector, -vector]) / length if length > 0 else np.empty((0, width), np.float32)
    return directions


def _applied(
    model: Differentiable,
    prompts: Sequence[Prompt],
    controller: Controller,
    strengths: Sequence[float],
    progress: Progress | None,
) -> Applied:
    n, S, T = len(prompts), len(strengths), model.num_layers
    alpha, push, displacement = np.empty((3, n, S, T), np.float32)
    error = np.full((n, S, T), np.nan, np.float32)
    for i, prompt in enumerate(prompts):
        run = roll_out(model, prompt, controller, strengths)
        steps = run.steered[:, :-1] - run.unsteered[:, :-1]
        alpha[i], push[i] = controller.shares[0] * np.abs(run.feature_error), run.push
        displacement[i] = np.linalg.norm(steps[..., : model.hidden_size], axis=2)
        for k in range(controller.active_layers[0] + 1, T):
            for s, trace in enumerate(run.traces):
                error[i, s, k] = displacement_error(model, trace, k, run.unsteered[s, k], steps[s, k][None])[0]
        if progress:
            progress("Steering", i + 1, n)
    return Applied(tuple(map(float, strengths)), alpha, push, displacement, error)


def _finite(jacobian: Float32, layer: int) -> Float32:
    if not np.all(np.isfinite(jacobian)):
        raise InputError(f"the Jacobian of layer {layer} is not finite: load the model with dtype float32")
    return jacobian


def monitored(controller: Controller, measured: Linearity, quantile: float = 0.1) -> Controller:
    """The controller with its checked region, in which its linear model is good: a low quantile over the prompts.

    `checked_error` at layer k is |alpha_k| where -f alpha_k v_k leaves the trust region along v_k. `checked_push` is
    that region of layer k + 1 along g_k; it is infinite at the last layer, which no block follows. No region is
    larger than the largest size that was tried.

    Raises:
        InputError: `measured` is of another controller.
    """
    if measured.concept != controller.concepts[0] or "push" not in measured.error:
        raise InputError("linearity was measured with another controller: give the same one to both")
    tried = measured.sizes[-1] * measured.norm.min(axis=0)
    error, push = (np.minimum(measured.trust_radius(kind, quantile), tried) for kind in ("concept", "push"))
    beyond = np.append(push[1:], np.inf)
    checked_error, checked_push = (
        np.where(np.isnan(radius), np.inf, radius)[:, None].astype(np.float32)
        for radius in (error / controller.shares[0], beyond)
    )
    return replace(controller, checked_error=checked_error, checked_push=checked_push)
