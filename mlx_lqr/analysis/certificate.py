"""What the linear model predicts of the closed loop, a bound on its error, and the error that was measured.

The loop steers one feature: z_{k+1} = phi_k(z_k) + u_k, u_k = (beta*_k - v_k' z_k) g_k. Compared with the same token
without control, z0_{k+1} = phi_k(z0_k) from the same z0_0, the error e_k = z_k - z0_k starts at zero and obeys exactly

    e_{k+1} = F_k e_k + w_k + r_k,   F_k = A_k - g_k v_k',   w_k = (beta*_k - v_k' z0_k) g_k,

with A_k the Jacobian at this prompt, or averaged over others, and r_k = phi_k(z0_k + e_k) - phi_k(z0_k) - A_k e_k.
w_k is known before anything is steered, so p_{k+1} = F_k p_k + w_k predicts e_k. d_k = e_k - p_k obeys d_{k+1} =
F_k d_k + r_k, d_0 = 0; lyapunov.py bounds d_k, and v_k' d_k, the error of the feature's prediction. The constants c_k
and L_k in |r_k| <= c_k |e_k| + (L_k / 2) |e_k|^2 are estimated from samples at calibration prompts; everything is then
checked on held-out prompts. An estimate is not a proof: docs/theory.md names every assumption.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from mlx_lqr.analysis.closed_loop import SAMPLES, AtPrompt, Averaged, ClosedLoop, Contraction, Swept
from mlx_lqr.analysis.inputs import check_seed, check_single, check_strengths
from mlx_lqr.analysis.lyapunov import Float64, error_bound, prior_bound, remainder_bound
from mlx_lqr.analysis.rollout import Rollout, roll_out
from mlx_lqr.backends.capabilities import DIFFERENTIABLE, require
from mlx_lqr.backends.protocol import Differentiable, Progress
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.linearize import Jacobians, linearize
from mlx_lqr.lqr.prompts import Prompt

Linearised = Literal["prompt", "average"]
"""Where the Jacobians are computed: at each prompt, or averaged over the calibration prompts."""
TOLERANCE = 0.5
"""A setpoint counts as reached within this multiple of mu_k, half the distance between texts with and without the
concept."""
BAND = np.arange(-8, 8.125, 0.25)
"""The strengths among which the certified band is searched."""
SHARE = 0.95
"""The share of prompts that must hold for a strength to belong to a band."""
ROUNDING = 2.0**-21
"""The rounding error of a block's output in float32, as a multiple of |z_k|: eight units of rounding."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """A constant per layer, estimated from samples; the bound uses `quantile`. NaN at layers without samples."""

    quantile: Float64
    """(T,): a quantile of the samples along the steered displacements"""
    maximum: Float64
    """(T,): the largest of these samples"""
    by_direction: dict[str, Float64]
    """direction -> (T,): the same quantile along other directions, for comparison"""
    samples: int
    """How many samples per layer and direction."""


@dataclass(frozen=True, eq=False)
class Certificate:
    """Bounds and measurements at the last tokens of n held-out prompts and S strengths, on a model of T blocks.

    Features are v_k . z_k in the residual stream's units; k = T is the last block's output. Errors before the first
    controlled layer are zero. "Posterior" bounds use the measured errors |e_i| of the layers before; "prior" bounds use
    the unsteered token alone.
    """

    model_name: str
    concept: str
    strengths: tuple[float, ...]
    linearised: Linearised
    calibration_prompts: int
    held_out_prompts: int
    quantile: float
    """The quantile of the samples that gives the constants."""
    first: int
    """The first controlled layer"""
    magnitude: Float64
    """(T + 1,): mu_k"""
    contraction: Contraction
    """Of the closed loop F_k; medians over the held-out prompts if each has its own Jacobians"""
    full_state: Contraction | None
    """Of the loop A_k - K_k that the paper analyses, which is not the one that runs; None for the feature cost"""
    mismatch: Estimate
    """c_k: how far the average Jacobian is off at a prompt; about zero for the prompt's own"""
    curvature: Estimate
    """L_k, in 1 / units of |.|_P"""
    setpoint: Float64
    """(S, T + 1): beta*_k. At k = T, where nothing is controlled, strength x mu_T; NaN for a centred setpoint"""
    unsteered: Float64
    """(n, S, T + 1): the feature without control at this token"""
    feature: Float64
    """(n, S, T + 1): the measured feature"""
    predicted: Float64
    """(n, S, T + 1): the feature predicted by the linear model"""
    feature_posterior: Float64
    """(n, S, T + 1): posterior bound of |feature - predicted|"""
    feature_prior: Float64
    """(n, S, T + 1): prior bound of the same"""
    displacement: Float64
    """(n, S, T + 1): |e_k|_{P_k}"""
    deviation: Float64
    """(n, S, T + 1): |d_k|_{P_k}, measured"""
    deviation_posterior: Float64
    """(n, S, T + 1): its posterior bound"""
    deviation_prior: Float64
    """(n, S, T + 1): its prior bound"""
    remainder_held: Float64
    """(T,): share of prompts and strengths at which |r_k| <= c_k |e_k| + (L_k / 2) |e_k|^2"""
    certified_band: Float64
    """(T + 1, 2): the lowest and highest strength between which the prior bound keeps the feature within `TOLERANCE`
    mu_k of its prediction for 95 % of the prompts; NaN if there is none"""

    def held(self, quantity: str = "feature", kind: str = "posterior") -> Float64:
        """(T + 1,): how often a bound held, over prompts and strengths. `quantity`: "feature" or "deviation"."""
        measured = np.abs(self.feature - self.predicted) if quantity == "feature" else self.deviation
        bound = getattr(self, f"{quantity}_{kind}")
        return np.mean(measured <= bound, axis=(0, 1))

    def measured_band(self) -> list[tuple[float, ...]]:
        """For every layer 0..T the strengths at which 95 % of the prompts were within `TOLERANCE` mu_k of the
        prediction."""
        missed = np.quantile(np.abs(self.feature - self.predicted), SHARE, axis=0, method="higher")  # (S, T + 1)
        reached = missed <= TOLERANCE * self.magnitude
        return [tuple(s for s, ok in zip(self.strengths, column, strict=True) if ok) for column in reached.T]


def certify(
    model: Differentiable,
    controller: Controller,
    calibration: Sequence[Prompt],
    held_out: Sequence[Prompt],
    *,
    strengths: Sequence[float] = (1.0, 2.0, 3.0),
    linearised: Linearised = "prompt",
    jacobians: Jacobians | None = None,
    quantile: float = SHARE,
    full_state: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Certificate:
    """Bound the tracking error of a controller of one concept, and compare the bound with measurements.

    Goes layer by layer, with a few (d, d) float64 matrices and the prompts' residual streams in memory. Averaged
    Jacobians are in a file, given or temporary; it is read once upwards, for the predictions, and once downwards.

    Args:
        model: what `load` returned.
        controller: of one concept.
        calibration: prompts at which the constants are sampled (at most 32 tokens of each).
        held_out: other prompts, at which everything is checked.
        strengths: at which to run the loop; not 0, which does not steer.
        linearised: "prompt" uses each prompt's own Jacobians, as the paper does. "average" uses one set for all,
            averaged over the calibration prompts: cheaper, and looser by c_k.
        jacobians: for "average", Jacobians of this model from `linearize`.
        quantile: the quantile of the samples that gives the constants; 1 is the largest sample.
        full_state: also analyse the loop A_k - K_k, which feeds back the whole state (state cost only).
        seed: of the random directions.
        progress: called as progress(stage, done, total).

    Raises:
        InputError: unusable prompts or options, a controller or Jacobians of another model, a controller of several
            concepts, or activations overflow.
    """
    require(model, DIFFERENTIABLE, "certify controllers")
    check_single(controller, model)
    _check(model, controller, calibration, held_out, strengths, linearised, jacobians, quantile, seed)
    runs: list[Rollout] = []
    for prompt in [*calibration, *held_out]:
        runs.append(roll_out(model, prompt, controller, strengths))
        if progress:
            progress("Steering", len(runs), len(calibration) + len(held_out))
    known, unknown = runs[: len(calibration)], runs[len(calibration) :]
    pairs = list(zip(known, [*known[1:], known[0]], strict=True))
    if linearised == "prompt":
        groups = []
        for i, run in enumerate(runs):
            loop = ClosedLoop(model, controller, strengths, AtPrompt(model, run.traces[0]))
            swept = loop.sweep([run], pairs[i : i + 1], seed + i)
            groups.append(swept)
            if progress:
                progress("Bounds", i + 1, len(runs))
        samples = [swept.samples for swept in groups[: len(known)]]
        last = ClosedLoop(model, controller, strengths, AtPrompt(model, unknown[0].traces[0]))
        return _assemble(last, groups[len(known) :], unknown, samples, len(known), quantile, linearised, full_state)
    with tempfile.TemporaryDirectory(prefix="mlx-lqr-") as folder:
        if jacobians is None:
            jacobians = linearize(model, calibration, store=Path(folder) / "jacobians.safetensors", progress=progress)
        loop = ClosedLoop(model, controller, strengths, Averaged(jacobians))
        total = model.num_layers - loop.first
        swept = loop.sweep(unknown, pairs, seed, (lambda done: progress("Bounds", done, total)) if progress else None)
        return _assemble(loop, [swept], unknown, [swept.samples], len(known), quantile, linearised, full_state)


def _check(
    model: Differentiable,
    controller: Controller,
    calibration: Sequence[Prompt],
    held_out: Sequence[Prompt],
    strengths: Sequence[float],
    linearised: Linearised,
    jacobians: Jacobians | None,
    quantile: float,
    seed: int,
) -> None:
    if not calibration or not held_out:
        raise InputError("certify needs prompts to calibrate and others to check: give at least two")
    check_strengths(strengths)
    check_seed(seed)
    if not 0 < quantile <= 1:
        raise InputError(f"quantile must be above 0 and at most 1, not {quantile!r}")
    if linearised not in get_args(Linearised):
        raise InputError(f"linearised must be 'prompt' or 'average', not {linearised!r}")
    if linearised == "prompt" and jacobians is not None:
        raise InputError("stored Jacobians are averages: use them with linearised='average' (--linearised average)")
    if jacobians is not None and jacobians.fingerprint != model.fingerprint:
        raise InputError(f"the Jacobians are of {jacobians.model_name or 'another model'}, not of {model.name}")
    if linearised == "prompt" and controller.positions == "all" and len(strengths) > 1:
        raise InputError(
            "this controller steers the prefix too, so each strength has Jacobians of its own: give one strength, or "
            "average (--linearised average)"
        )


def _assemble(
    loop: ClosedLoop,
    groups: Sequence[Swept],
    runs: Sequence[Rollout],
    samples: Sequence[dict[str, Float64]],
    calibration_prompts: int,
    quantile: float,
    linearised: Linearised,
    full_state: bool,
) -> Certificate:
    """The certificate from sweeps of held-out prompts (one for all, or one each) and samples of the constants."""
    strengths, v = loop.strengths, loop.sensor
    together = {name: np.concatenate([part[name] for part in samples], axis=-1) for name in SAMPLES}
    mismatch, curvature = (_estimate({name: s[which] for name, s in together.items()}, quantile) for which in (0, 1))
    c, L = np.nan_to_num(mismatch.quantile), np.nan_to_num(curvature.quantile)
    bounds = [_bounds(loop, swept, c, L, _rounding(swept)) for swept in groups]
    feature_posterior, feature_prior, posterior, prior, allowed, missed = (
        np.concatenate(parts) for parts in zip(*bounds, strict=True)
    )
    displacement, deviation, remainder = (  # (n, S, T + 1), and (n, S, T)
        np.concatenate([getattr(swept, name) for swept in groups])
        for name in ("displacement", "deviation", "remainder")
    )
    z0 = np.stack([run.unsteered for run in runs]).astype(np.float64)
    z = np.stack([run.steered for run in runs]).astype(np.float64)
    predicted = np.concatenate([swept.constant + strengths[:, None, None] * swept.slope for swept in groups])
    return Certificate(
        model_name=loop.model.name,
        concept=loop.controller.concepts[0],
        strengths=tuple(float(s) for s in strengths),
        linearised=linearised,
        calibration_prompts=calibration_prompts,
        held_out_prompts=len(runs),
        quantile=quantile,
        first=loop.first,
        magnitude=loop.magnitude,
        contraction=_median([swept.contraction for swept in groups]),
        full_state=loop.full_state() if full_state and loop.controller.cost == "state" else None,
        mismatch=mismatch,
        curvature=curvature,
        setpoint=loop.offset + strengths[:, None] * loop.magnitude,
        unsteered=np.einsum("nskd,kd->nsk", z0, v),
        feature=np.einsum("nskd,kd->nsk", z, v),
        predicted=np.einsum("nskd,kd->nsk", z0 + predicted, v),
        feature_posterior=feature_posterior,
        feature_prior=feature_prior,
        displacement=displacement,
        deviation=deviation,
        deviation_posterior=posterior,
        deviation_prior=prior,
        remainder_held=np.mean(remainder <= allowed, axis=(0, 1)),
        certified_band=_band(loop, missed),
    )


def _bounds(loop: ClosedLoop, swept: Swept, c: Float64, L: Float64, rounding: Float64) -> tuple[Float64, ...]:
    """Posterior and prior bound of the feature; posterior and prior bound of the state; the bound of the remainder; the
    prior bound of the feature at the strengths of the band."""
    transition, T = swept.contraction.transition, loop.T
    allowed = remainder_bound(c, L, swept.displacement[..., :T]) + rounding
    prior, disturbance = prior_bound(transition, _predicted_norm(swept.forms, loop.strengths[:, None]), c, L, rounding)
    some = slice(None) if loop.controller.positions == "all" else slice(1)  # else the same for every strength
    forced = _predicted_norm(swept.forms[:, some], _grid(loop)[:, None])
    over_grid = prior_bound(transition, forced, c, L, rounding[:, some])[1]
    return (
        error_bound(swept.feature_norms, 0.0, allowed),
        error_bound(swept.feature_norms, 0.0, disturbance),
        error_bound(transition, 0.0, allowed),
        prior,
        allowed,
        error_bound(swept.feature_norms, 0.0, over_grid),
    )


def _rounding(swept: Swept) -> Float64:
    """A bound of the rounding error of each layer, in the norm of P_{k+1}: (n, S, T)"""
    weight = np.append(np.nan_to_num(swept.contraction.largest_weight[1:]), 1.0)
    return ROUNDING * swept.norm[..., 1:] * np.sqrt(weight)


def _grid(loop: ClosedLoop) -> Float64:
    """The strengths of the band. If the prefix, and so z0, depends on the strength, only those that were run."""
    return loop.strengths if loop.controller.positions == "all" else BAND


def _predicted_norm(forms: Float64, strengths: Float64) -> Float64:
    """|p_k|_{P_k} at strengths (s, 1) from the quadratic forms (n, 1 or s, T + 1, 3): (n, s, T + 1)"""
    square = forms[..., 0] + strengths * forms[..., 1] + strengths**2 * forms[..., 2]
    return np.sqrt(np.maximum(square, 0.0))


def _band(loop: ClosedLoop, bound: Float64) -> Float64:
    """`Certificate.certified_band` from bounds on the grid (n, s, T + 1): the longest interval without a gap."""
    order = np.argsort(_grid(loop))
    grid = _grid(loop)[order]
    missed = np.quantile(bound, SHARE, axis=0, method="higher")[order]
    band = np.full((loop.T + 1, 2), np.nan)
    for k in range(loop.first, loop.T + 1):
        reached = missed[:, k] <= TOLERANCE * loop.magnitude[k]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], reached, [False]]).astype(int)))
        if edges.size:
            start, end = max(edges.reshape(-1, 2), key=lambda run: run[1] - run[0])
            band[k] = grid[start], grid[end - 1]
    return band


def _estimate(samples: dict[str, Float64], quantile: float) -> Estimate:
    """From direction -> samples (T, S, prompts)."""

    def of(values: Float64, q: float) -> Float64:
        flat = values.reshape(len(values), -1)
        result = np.full(len(flat), np.nan)
        for k, row in enumerate(flat):
            if (finite := row[np.isfinite(row)]).size:
                result[k] = np.quantile(finite, q, method="higher")
        return result

    steered = samples["steered"]
    by_direction = {name: of(values, quantile) for name, values in samples.items()}
    return Estimate(by_direction["steered"], of(steered, 1.0), by_direction, int(np.prod(steered.shape[1:])))


def _median(contractions: Sequence[Contraction]) -> Contraction:
    names = ("spectral_norm", "largest_weight", "step_norm", "to_output")
    return Contraction(*(np.median([getattr(one, name) for one in contractions], axis=0) for name in names))
