"""mlx-lqr certify: predict how far features end up from their setpoints, bound it, and check on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import numpy as np

from mlx_lqr.analysis.certificate import TOLERANCE, Certificate, Linearised
from mlx_lqr.analysis.certificate import certify as bound
from mlx_lqr.commands.analysis import Analysis, analysis_options
from mlx_lqr.commands.help import MEASURING, command, option
from mlx_lqr.commands.options import jacobians_option
from mlx_lqr.commands.output import say
from mlx_lqr.commands.tables import show_table
from mlx_lqr.errors import InputError
from mlx_lqr.files.results import as_json
from mlx_lqr.lqr.linearize import Jacobians

FEW_PROMPTS = 8
"""Fewer held-out prompts than this say little of how often a bound holds."""


@command()
@analysis_options(
    name="certificate",
    done="certified",
    prompts="Every other one calibrates the constants, the rest check the bound.",
    count=16,
    controller="",
)
@option(
    "--linearised",
    type=click.Choice(["prompt", "average"]),
    default="prompt",
    heading=MEASURING,
    help="Use each prompt's own Jacobians, or their average over the calibration prompts: cheaper and looser.",
)
@jacobians_option("With --linearised average: Jacobians stored by `mlx-lqr linearize`.", MEASURING)
@option(
    "--quantile",
    default=0.95,
    heading=MEASURING,
    help="The bound's constants are this quantile of what is sampled.",
)
def certify(analysis: Analysis, linearised: Linearised, jacobians: str | None, quantile: float) -> None:
    """Bound a controller's tracking error.

    The bound's constants are estimated on some prompts, and the bound is checked on others.
    """
    assert analysis.controller is not None, "-c is required"
    controller = analysis.controller
    stored = Jacobians.load(jacobians) if jacobians is not None else None
    if len(analysis.prompts) < 2:
        raise InputError("--prompts gives only one prompt: certify needs one to calibrate with and one to check on")
    certificate = analysis.measure(
        lambda model, progress: bound(
            model,
            controller,
            analysis.prompts[::2],
            analysis.prompts[1::2],
            strengths=analysis.strengths,
            linearised=linearised,
            jacobians=stored,
            quantile=quantile,
            seed=analysis.seed,
            progress=progress,
        )
    )
    if certificate.held_out_prompts < FEW_PROMPTS:
        say(
            f"Note: {certificate.calibration_prompts} prompts calibrated and {certificate.held_out_prompts} checked, "
            f"which is few for quantiles and shares: give {2 * FEW_PROMPTS} or more with --prompts",
            err=True,
        )
    analysis.report(_numbers(certificate), lambda plots: plots.of_certificate(certificate), lambda: _show(certificate))


def _numbers(certificate: Certificate) -> dict[str, Any]:
    """The certificate, how often its bounds held, and the strengths at which features came near their predictions."""
    pairs = [(quantity, kind) for quantity in ("feature", "deviation") for kind in ("posterior", "prior")]
    held = {f"{quantity}_{kind}": certificate.held(quantity, kind) for quantity, kind in pairs}
    return {**as_json(certificate), "held": held, "measured_band": certificate.measured_band()}


def _show(certificate: Certificate) -> None:
    """A table for each strength, and one of what holds for all of them."""
    say(
        f"{certificate.model_name}, {certificate.concept}: {certificate.held_out_prompts} held-out prompts, constants "
        f"estimated as the {certificate.quantile:.0%} quantile of samples at {certificate.calibration_prompts} others "
        "(an estimate, not a proof)"
    )
    for s, strength in enumerate(certificate.strengths):
        say()
        show_table(
            ["layer", "mu_k", "setpoint", "unsteered", "predicted", "feature", "off", "bound", "prior bound"],
            [_at_strength(certificate, s, k) for k in _layers(certificate)],
            left=(),
            title=f"strength {strength:g}: medians over prompts, in multiples of mu_k",
        )
    say()
    show_table(
        [
            "layer",
            "largest weight",
            "step",
            "c_k",
            "L_k",
            "remainder",
            "feature",
            "state held",
            "band (certified)",
            "measured",
        ],
        [_at_all_strengths(certificate, k) for k in _layers(certificate)],
        left=(),
        title="for all strengths together",
    )
    say(
        "off: |feature - predicted|. bound: at most this far off, given the errors of the layers before; prior bound: "
        "at most this far off, before anything is steered. band: strengths at which that is within "
        f"{TOLERANCE:g} mu_k for 95 % of the prompts (none: it says nothing); measured: those tried at which the "
        "feature itself was."
    )


def _layers(certificate: Certificate) -> Sequence[int]:
    """From the first layer with control to T, the output."""
    return range(certificate.first, len(certificate.magnitude))


def _layer(certificate: Certificate, k: int) -> str:
    return str(k) if k < len(certificate.magnitude) - 1 else "out"


def _at_strength(certificate: Certificate, s: int, k: int) -> list[str]:
    """A row of the table of strength s."""
    mu = certificate.magnitude[k]
    parts = certificate.unsteered, certificate.predicted, certificate.feature
    values = [certificate.setpoint[s, k], *(np.median(part[:, s, k]) for part in parts)]
    off = np.median(np.abs(certificate.feature - certificate.predicted)[:, s, k])
    bounds = [np.median(part[:, s, k]) for part in (certificate.feature_posterior, certificate.feature_prior)]

    def of_mu(value: float) -> float:
        return value / mu if mu > 0 else np.nan

    return [
        _layer(certificate, k),
        f"{mu:.2f}",
        *(_number(of_mu(value), 2) for value in values),
        _number(of_mu(off), 3),
        *(_bound(of_mu(value)) for value in bounds),
    ]


def _at_all_strengths(certificate: Certificate, k: int) -> list[str]:
    """A row of the last table. What belongs to a block is left out at the output."""
    block = [""] * 5
    if k < len(certificate.magnitude) - 1:
        loop = certificate.contraction
        block = [
            f"{loop.largest_weight[k]:.1f}",
            f"{loop.step_norm[k]:.3f}",
            _number(certificate.mismatch.quantile[k], 3),
            _number(certificate.curvature.quantile[k], 5),
            f"{certificate.remainder_held[k]:.0%}",
        ]
    low, high = certificate.certified_band[k]
    return [
        _layer(certificate, k),
        *block,
        f"{certificate.held()[k]:.0%}",
        f"{certificate.held('deviation')[k]:.0%}",
        "none" if np.isnan(low) else f"{low:g} to {high:g}",
        ", ".join(f"{strength:g}" for strength in certificate.measured_band()[k]) or "none",
    ]


def _number(value: float, decimals: int) -> str:
    return "-" if np.isnan(value) else f"{value:.{decimals}f}"


def _bound(value: float) -> str:
    if np.isnan(value):
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:.0e}" if np.isfinite(value) else "inf"
