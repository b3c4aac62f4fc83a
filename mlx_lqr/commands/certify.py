"""mlx-lqr certify"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from mlx_lqr.analysis.certificate import TOLERANCE, Certificate, Linearised
from mlx_lqr.analysis.certificate import certify as bound
from mlx_lqr.analysis.inputs import check_strengths, default_prompts
from mlx_lqr.commands.options import (
    NOTHING_WRITTEN,
    Loading,
    force_option,
    loading_options,
    model_argument,
    parse_strengths,
    plots_or_refusal,
    progress_bars,
    stopping,
    strengths_option,
)
from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import check_writable
from mlx_lqr.files.prompts import read_prompts
from mlx_lqr.files.results import as_json, write_json
from mlx_lqr.loading import load
from mlx_lqr.lqr.linearize import Jacobians
from mlx_lqr.methods.baseline import load_steering
from mlx_lqr.methods.running import only_controller

PROMPTS = 16
FEW_PROMPTS = 8
"""Fewer held-out prompts than this say little of how often a bound holds."""


@click.command()
@model_argument
@click.option("-c", "--controller", required=True, type=click.Path(), help="The controller, of one concept.")
@click.option(
    "--prompts",
    type=click.Path(),
    help=f"Every other one calibrates, the rest are held out; by default {PROMPTS} bundled half sentences.",
)
@strengths_option
@click.option(
    "--linearised",
    type=click.Choice(["prompt", "average"]),
    default="prompt",
    show_default=True,
    help="Each prompt's own Jacobians, or their average over the calibration prompts, which is cheaper and looser.",
)
@click.option("--jacobians", type=click.Path(), help="With --linearised average: stored by `mlx-lqr linearize`.")
@click.option("--quantile", default=0.95, show_default=True, help="Of the samples, for the constants of the bound.")
@click.option("--seed", default=0, show_default=True, help="Of the random directions.")
@click.option("-o", "--output", type=click.Path(), help="A folder for the plots (PNG and SVG) and the numbers (JSON).")
@force_option
@click.option("--json", "as_numbers", is_flag=True, help="All numbers to stdout, for scripts.")
@loading_options
def certify(
    model: str,
    controller: str,
    prompts: str | None,
    strengths: str,
    linearised: Linearised,
    jacobians: str | None,
    quantile: float,
    seed: int,
    output: str | None,
    as_numbers: bool,
    force: bool,
    loading: Loading,
) -> None:
    """Bound a controller's tracking error on MODEL, from estimated constants, and check it on held-out prompts."""
    chosen = parse_strengths(strengths)
    check_strengths(chosen)
    steering = only_controller(load_steering(controller, model), "certified")
    stored = Jacobians.load(jacobians) if jacobians is not None else None
    plots = plots_or_refusal() if output is not None else None
    if output is not None:
        check_writable(Path(output) / "certificate.json", "results", force=force)
    texts = read_prompts(prompts) if prompts is not None else default_prompts(PROMPTS, steering.concepts)
    if len(texts) < 2:
        raise InputError(f"{prompts} has one prompt: certify needs one to calibrate with and another to check on")
    with stopping(NOTHING_WRITTEN), progress_bars() as progress:
        loaded = load(model, **loading, progress=progress)
        found = bound(
            loaded,
            steering,
            texts[::2],
            texts[1::2],
            strengths=chosen,
            linearised=linearised,
            jacobians=stored,
            quantile=quantile,
            seed=seed,
            progress=progress,
        )
    if output is not None and plots is not None:
        write_json(Path(output) / "certificate.json", _numbers(found), force=force)
        plots.save_all(plots.of_certificate(found), output, force=force)
    if found.held_out_prompts < FEW_PROMPTS:
        click.echo(
            f"Note: {found.calibration_prompts} prompts calibrated and {found.held_out_prompts} checked, which are few "
            f"for quantiles and shares: give {2 * FEW_PROMPTS} or more with --prompts",
            err=True,
        )
    if as_numbers:
        click.echo(json.dumps(_numbers(found)))
    else:
        _tables(found)
        if output is not None:
            click.echo(f"Wrote plots and numbers to {output}")


def _numbers(found: Certificate) -> dict[str, Any]:
    """The certificate, how often its bounds held, and the strengths at which features came near their predictions."""
    pairs = [(quantity, kind) for quantity in ("feature", "deviation") for kind in ("posterior", "prior")]
    held = {f"{quantity}_{kind}": found.held(quantity, kind) for quantity, kind in pairs}
    return {**as_json(found), "held": as_json(held), "measured_band": as_json(found.measured_band())}


def _tables(found: Certificate) -> None:
    """A table for each strength, and one of what holds for all of them."""
    mu = found.magnitude
    click.echo(
        f"{found.model_name}, {found.concept}: {found.held_out_prompts} held-out prompts, constants estimated as the "
        f"{found.quantile:.0%} quantile of samples at {found.calibration_prompts} others (an estimate, not a proof)"
    )
    for s, strength in enumerate(found.strengths):
        click.echo(f"\nstrength {strength:g}: medians over prompts, in multiples of mu_k")
        click.echo("layer     mu_k  setpoint  unsteered  predicted  feature     off   bound  prior bound")
        for k in range(found.first, len(mu)):
            values = [found.setpoint[s, k]]
            values += [np.median(part[:, s, k]) for part in (found.unsteered, found.predicted, found.feature)]
            values += [np.median(np.abs(found.feature - found.predicted)[:, s, k])]
            values += [np.median(part[:, s, k]) for part in (found.feature_posterior, found.feature_prior)]
            numbers = [value / mu[k] if mu[k] > 0 else np.nan for value in values]
            cells = "".join(f"{number:{width}.2f}" for number, width in zip(numbers[:4], (10, 11, 11, 9), strict=True))
            bounds = f"{_bound(numbers[5]):>8}{_bound(numbers[6]):>13}"
            click.echo(f"{_layer(found, k)} {mu[k]:8.2f}{cells}{numbers[4]:8.3f}{bounds}")
    _constants(found)


def _constants(found: Certificate) -> None:
    click.echo("\nfor all strengths together")
    click.echo(
        "layer  largest weight   step      c_k       L_k  remainder  feature  state held   band (certified)  measured"
    )
    feature, state, measured = found.held(), found.held("deviation"), found.measured_band()
    T = len(found.magnitude) - 1
    for k in range(found.first, T + 1):
        if k < T:
            loop, c, L = found.contraction, found.mismatch.quantile[k], found.curvature.quantile[k]
            row = f"{loop.largest_weight[k]:14.1f} {loop.step_norm[k]:6.3f} {c:8.3f} {L:9.5f}"
            row += f" {found.remainder_held[k]:10.0%}"
        else:
            row = " " * 51
        low, high = found.certified_band[k]
        band = "none" if np.isnan(low) else f"{low:g} to {high:g}"
        click.echo(
            f"{_layer(found, k)}  {row} {feature[k]:8.0%} {state[k]:11.0%} {band:>18}  "
            + (", ".join(f"{s:g}" for s in measured[k]) or "none")
        )
    click.echo(
        "off: |feature - predicted|. bound: of that, knowing the errors of the layers before; prior bound: before "
        f"anything is steered. band: strengths at which the prior bound is within {TOLERANCE:g} mu_k for 95 % of the "
        "prompts (none: it says nothing); measured: those tried at which the feature itself was."
    )


def _layer(found: Certificate, k: int) -> str:
    return f"{k:5d}" if k < len(found.magnitude) - 1 else "  out"


def _bound(value: float) -> str:
    return (
        "-" if np.isnan(value) else f"{value:.2f}" if value < 1000 else f"{value:.0e}" if np.isfinite(value) else "inf"
    )
