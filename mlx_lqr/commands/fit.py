"""mlx-lqr linearize and mlx-lqr fit"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from mlx_lqr.commands.options import Loading, force_option, loading_options, model_argument
from mlx_lqr.commands.progress import NOTHING_WRITTEN, going_on_later, progress_bars, stopping
from mlx_lqr.commands.values import parse_layers
from mlx_lqr.concepts import bundled_prompts
from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import check_writable
from mlx_lqr.files.prompts import read_prompts
from mlx_lqr.loading import load
from mlx_lqr.lqr.controller import Cost, Positions, Setpoint
from mlx_lqr.lqr.fit import fit as fit_controller
from mlx_lqr.lqr.linearize import Jacobians
from mlx_lqr.lqr.linearize import linearize as linearize_model
from mlx_lqr.lqr.riccati import WEIGHT, Weights
from mlx_lqr.methods.baseline import METHODS, MethodName, known_method
from mlx_lqr.methods.fitting import check_options, fit_baseline


@click.command()
@model_argument
@click.option("-o", "--output", required=True, type=click.Path(), help="The file to write.")
@click.option(
    "--prompts", type=click.Path(), help="Nominal prompts; by default eight of the bundled neutral sentences."
)
@click.option("--nominal", metavar="TEXT", help="Linearise at this one prompt.")
@click.option("--store", default="float32", show_default=True, help="float32, or float16 for half the size.")
@force_option
@loading_options
def linearize(
    model: str, output: str, prompts: str | None, nominal: str | None, store: str, force: bool, loading: Loading
) -> None:
    """Store a model's Jacobians for `fit`.

    They serve (fit --jacobians) for any concept and any weights. If it is interrupted, the same command goes on.
    """
    check_writable(output, "Jacobians", force=force)
    if prompts is not None and nominal is not None:
        raise InputError("give --prompts FILE or --nominal TEXT, not both")
    chosen = bundled_prompts("dog")[1][:8] if nominal is None else [nominal]
    if prompts is not None:
        chosen = read_prompts(prompts)
    with going_on_later(), progress_bars() as progress:
        loaded = load(model, **loading, progress=progress)
        jacobians = linearize_model(loaded, chosen, store=output, dtype=store, force=force, progress=progress)
    click.echo(f"Wrote {output}: {len(jacobians)} Jacobians averaged over {jacobians.prompt_count} prompts")


@click.command()
@model_argument
@click.option("-o", "--output", required=True, type=click.Path(), help="The controller file to write.")
@click.option(
    "--method",
    type=click.Choice(["alqr", *METHODS]),
    default="alqr",
    show_default=True,
    help="Activation LQR, or one of the methods that it is compared with.",
)
@click.option("--concept", help="A bundled contrast set (see `mlx-lqr concepts`), or the name of your own.")
@click.option(
    "--positive", type=click.Path(), help="Prompts with the concept: one a line, or JSON lines with a prompt key."
)
@click.option("--negative", type=click.Path(), help="Prompts without it.")
@click.option("--jacobians", type=click.Path(), help="Jacobians stored by `mlx-lqr linearize`.")
@click.option("--jacobian-prompts", default=8, show_default=True, help="Positive prompts to linearise at.")
@click.option(
    "--q", default=WEIGHT, show_default=True, help="Weight of the state. Only q/r and qf/r matter; more steers harder."
)
@click.option("--r", default=1.0, show_default=True, help="Weight of the control.")
@click.option("--qf", default=WEIGHT, show_default=True, help="Weight of the last layer's output.")
@click.option(
    "--layers",
    help="Where control may act, such as 20-29 or all; auto, the default of alqr, is the layers that tell the prompts "
    "apart. By default the other methods act at all (actadd, odesteer, angular: at the middle one).",
)
@click.option(
    "--cost",
    type=click.Choice(get_args(Cost)),
    default="state",
    show_default=True,
    help="Penalise any error of the state, or that of the concept's feature alone, which is much cheaper to fit; "
    "adaptive: the same, made anew at every prompt.",
)
@click.option(
    "--setpoint",
    type=click.Choice(get_args(Setpoint)),
    default="centred",
    show_default=True,
    help="What strengths count from: as much of the feature as the negative prompts have, or (the paper's) none of it. "
    "Strength 0 itself does not steer.",
)
@click.option(
    "--positions",
    type=click.Choice(["last", "all"]),
    help="Steer from the prompt's last token on, or every prompt token too; by default as the method's paper does: "
    "last, and all for ablation, the AcT family and angular steering.",
)
@click.option("--kp", type=float, help="Proportional gain (proportional, spid, pid-act).")
@click.option("--ki", type=float, help="Integral gain (spid, pid-act).")
@click.option("--kd", type=float, help="Derivative gain (spid, pid-act).")
@click.option("--heads", type=int, help="How many attention heads are moved (iti); by default 48 of every 1024.")
@click.option("--source-layer", type=int, help="Whose direction is ablated at every layer (ablation).")
@click.option("--simultaneous", is_flag=True, help="Fit all layers at once, not one after the other (the AcT family).")
@force_option
@loading_options
def fit(
    model: str,
    output: str,
    method: str,
    concept: str | None,
    positive: str | None,
    negative: str | None,
    jacobians: str | None,
    jacobian_prompts: int,
    q: float,
    r: float,
    qf: float,
    layers: str | None,
    cost: Cost,
    setpoint: Setpoint,
    positions: Positions | None,
    simultaneous: bool,
    source_layer: int | None,
    heads: int | None,
    force: bool,
    loading: Loading,
    **gains: float | None,
) -> None:
    """Fit a controller for a concept.

    It may also be the steering of another method (--method).
    """
    Weights(q, r, qf)  # mistakes are refused before the model is loaded
    check_writable(output, "controller", force=force)
    chosen = parse_layers(layers)
    name, positive_prompts, negative_prompts = contrast_prompts(concept, positive, negative)
    known = known_method(method)
    _refuse_options_of_others(_OF_BASELINES if known is None else _OF_ALQR, method)
    if known is not None:
        options: dict[str, Any] = {
            "numbers": {number: value for number, value in gains.items() if value is not None},
            "source_layer": source_layer,
            "incremental": not simultaneous,
            "heads": heads,
        }
        check_options(known, **options)
        with stopping(NOTHING_WRITTEN), progress_bars() as progress:
            loaded = load(model, **loading, progress=progress)
            prompts = positive_prompts, negative_prompts
            options |= {"concept": name, "layers": chosen, "positions": positions, "progress": progress}
            fit_baseline(loaded, known, *prompts, **options).save(output, force=force)
        note_few_prompts(positive_prompts, negative_prompts)
        say_how_to_use(model, output, _WORTH_TRYING.get(known, "1"))
        return
    stored = Jacobians.load(jacobians) if jacobians is not None else None
    with stopping(NOTHING_WRITTEN), progress_bars() as progress:
        loaded = load(model, **loading, progress=progress)
        controller = fit_controller(
            loaded,
            positive_prompts,
            negative_prompts,
            concept=name,
            q=q,
            r=r,
            qf=qf,
            layers=chosen,
            cost=cost,
            setpoint=setpoint,
            positions=positions or "last",
            jacobian_prompts=jacobian_prompts,
            jacobians=stored,
            progress=progress,
        )
        controller.save(output, force=force)
    note_few_prompts(positive_prompts, negative_prompts)
    say_how_to_use(model, output, "2")


_WORTH_TRYING: Mapping[MethodName, str] = {"angular": "90", "adaptive-angular": "90", "iti": "5", "odesteer": "2"}
_OF_ALQR = ("q", "r", "qf", "cost", "setpoint", "jacobians", "jacobian_prompts")
_OF_BASELINES = ("kp", "ki", "kd", "source_layer", "simultaneous", "heads")


def _refuse_options_of_others(names: tuple[str, ...], method: str) -> None:
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} is not for the method {method}: leave it out, or choose another --method")


FEW_PROMPTS = 8
"""Below it a direction is more that of the very sentences than that of what they have in common."""


def note_few_prompts(positive: Sequence[str], negative: Sequence[str]) -> None:
    """Say so where a concept was to be found in hardly any prompts."""
    if min(len(positive), len(negative)) < FEW_PROMPTS:
        click.echo(
            f"Note: {len(positive)} positive and {len(negative)} negative prompts are few: what is found is more these "
            "sentences than the concept; give 20 or more of each",
            err=True,
        )


def say_how_to_use(model: str, output: str, strength: str | None) -> None:
    """A command to go on with, at a strength worth trying; None for a file that recommends its own."""
    steering = output if strength is None else f"{output}:{strength}"
    click.echo(f"Wrote {output} ({Path(output).stat().st_size / 1000:.0f} kB). Try it:")
    click.echo(f"  mlx-lqr generate {model} -p 'Once upon a time,' -c {steering}")


def contrast_prompts(
    concept: str | None, positive: str | None, negative: str | None
) -> tuple[str, list[str], list[str]]:
    """The concept's name and its two sets of prompts, from the options of these names."""
    if positive is not None and negative is not None:
        return concept or Path(positive).stem, read_prompts(positive), read_prompts(negative)
    if positive is not None or negative is not None:
        raise InputError("give both --positive and --negative")
    if not concept:
        raise InputError(
            "name a bundled --concept (see `mlx-lqr concepts`), or give --positive FILE and --negative FILE"
        )
    return concept, *bundled_prompts(concept)
