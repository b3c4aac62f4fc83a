"""mlx-lqr linearity"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np

from mlx_lqr.analysis.inputs import check_strengths, default_prompts
from mlx_lqr.analysis.linearity import Linearity, monitored
from mlx_lqr.analysis.linearity import linearity as measure
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
from mlx_lqr.methods.baseline import load_steering
from mlx_lqr.methods.running import only_controller

PROMPTS = 8
FEW_PROMPTS = 4


@click.command()
@model_argument
@click.option("--prompts", type=click.Path(), help=f"Prompts to compare; by default {PROMPTS} bundled half sentences.")
@click.option("-c", "--controller", type=click.Path(), help="Look at its directions, and at what it does, too.")
@strengths_option
@click.option("--modes", default=8, show_default=True, help="Dominant modes in the matrices of alignment.")
@click.option("--seed", default=0, show_default=True, help="Of the random directions.")
@click.option("--write", is_flag=True, help="Store the region found in the controller, for chat to warn beyond it.")
@click.option("-o", "--output", type=click.Path(), help="A folder for the plots (PNG and SVG) and the numbers (JSON).")
@force_option
@click.option("--json", "as_numbers", is_flag=True, help="All numbers to stdout, for scripts.")
@loading_options
def linearity(
    model: str,
    prompts: str | None,
    controller: str | None,
    strengths: str,
    modes: int,
    seed: int,
    write: bool,
    output: str | None,
    as_numbers: bool,
    force: bool,
    loading: Loading,
) -> None:
    """Measure how linear the blocks of MODEL are: the Jacobians' spectra and alignment, and the linearisation error."""
    if write and controller is None:
        raise InputError("--write stores the region in a controller: add -c FILE")
    if modes < 1:
        raise InputError(f"--modes must be at least 1, not {modes}")
    chosen = parse_strengths(strengths)
    if controller is not None:
        check_strengths(chosen)
    steering = only_controller(load_steering(controller, model), "looked at here") if controller is not None else None
    plots = plots_or_refusal() if output is not None else None
    if output is not None:
        check_writable(Path(output) / "linearity.json", "results", force=force)
    default = default_prompts(PROMPTS, steering.concepts if steering else ())
    texts = read_prompts(prompts) if prompts is not None else default
    with stopping(NOTHING_WRITTEN), progress_bars() as progress:
        loaded = load(model, **loading, progress=progress)
        found = measure(loaded, texts, steering, strengths=chosen, modes=modes, seed=seed, progress=progress)
    if steering is not None and controller is not None and write:
        monitored(steering, found).save(controller)
    if output is not None and plots is not None:
        write_json(Path(output) / "linearity.json", found, force=force)
        plots.save_all(plots.of_linearity(found), output, force=force)
    if found.prompt_count < FEW_PROMPTS:
        click.echo(f"Note: medians over {found.prompt_count} prompts say little: give {PROMPTS} or more", err=True)
    if as_numbers:
        click.echo(json.dumps(as_json(found)))
    else:
        _table(found)
        for line in [f"Wrote plots and numbers to {output}"] * bool(output) + [f"Wrote {controller}"] * write:
            click.echo(line)


def _table(found: Linearity) -> None:
    applied = found.applied
    m = found.mode_counts.index(found.modes)
    steered = (
        "" if applied is None else f", {found.concept} at strengths {', '.join(f'{s:g}' for s in applied.strengths)}"
    )
    click.echo(f"{found.model_name}, medians over {found.prompt_count} prompts{steered}")
    kinds = list(found.trust)
    header = "layer    |z_k|   largest sv  median sv  similarity (chance)" + "".join(f"{kind:>9}" for kind in kinds)
    click.echo(header + ("" if applied is None else "   alpha/trust  push/trust"))
    for k in range(found.norm.shape[1]):
        values = found.singular_values[1, k]
        row = f"{k:5d} {np.median(found.norm[:, k]):8.1f} {values[0]:12.2f} {np.median(values):10.2f}"
        row += f" {found.similarity_by_modes[k, m]:11.2f} ({found.rotated_by_modes[k, m]:.2f})  "
        row += "".join(f"{_size(float(np.median(found.trust[kind][:, k]))):>9}" for kind in kinds)
        if applied is not None:
            row += "".join(f"{_size(ratio[k]):>13}" for ratio in shares_of_trust(found))
        click.echo(row)
    click.echo(
        "sv: singular values of A_k; similarity: of two prompts' A_k at the top "
        f"{found.modes} modes (of random directions); {', '.join(kinds)}: |dz| / |z_k| at which the error passes 10 %"
    )
    if applied is not None:
        click.echo("alpha/trust, push/trust: |alpha_k| and |u_k| over the trust region, at the largest strength")


def shares_of_trust(found: Linearity) -> tuple[np.ndarray, np.ndarray]:
    """Median |alpha_k| and |u_k| (T,) at the largest strength over the trust region of where they act."""
    assert found.applied is not None
    s = int(np.argmax(np.abs(found.applied.strengths)))
    push_region = np.append(found.trust_radius("push")[1:], np.nan)
    alpha, push = (np.median(part[:, s], axis=0) for part in (found.applied.feature_error, found.applied.push))
    controlled = np.where(push > 0, 1.0, np.nan)  # elsewhere no error is acted upon
    return controlled * alpha / found.trust_radius("concept"), controlled * push / push_region


def _size(value: float) -> str:
    return "-" if np.isnan(value) else ">3" if np.isinf(value) else f"{value:.2f}"
