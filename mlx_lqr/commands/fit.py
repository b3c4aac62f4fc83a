"""mlx-lqr linearize and mlx-lqr fit"""

from __future__ import annotations

from pathlib import Path

import click

from mlx_lqr.atomic import check_writable
from mlx_lqr.commands.options import Loading, loading_options, model_argument, parse_layers, progress_bars
from mlx_lqr.contrast import bundled_prompts, read_prompts
from mlx_lqr.controller import Cost, Positions
from mlx_lqr.errors import InputError
from mlx_lqr.linearize import Jacobians
from mlx_lqr.linearize import linearize as linearize_model
from mlx_lqr.loading import load
from mlx_lqr.riccati import Weights
from mlx_lqr.synthesis import fit as fit_controller


@click.command()
@model_argument
@click.option("-o", "--output", required=True, type=click.Path(), help="The file to write.")
@click.option(
    "--prompts", type=click.Path(), help="Nominal prompts; by default eight of the bundled neutral sentences."
)
@click.option("--nominal", metavar="TEXT", help="Linearise at this one prompt.")
@click.option("--store", default="float32", show_default=True, help="float32, or float16 for half the size.")
@loading_options
def linearize(model: str, output: str, prompts: str | None, nominal: str | None, store: str, loading: Loading) -> None:
    """Compute and store the layer Jacobians of MODEL, to be used for any concept and any weights (fit --jacobians).

    Interrupted, the same command goes on where it stopped.
    """
    check_writable(output)
    if prompts and nominal:
        raise InputError("give --prompts FILE or --nominal TEXT, not both")
    chosen = [nominal] if nominal else read_prompts(prompts) if prompts else bundled_prompts("dog")[1][:8]
    with progress_bars() as progress:
        loaded = load(model, **loading, progress=progress)
        jacobians = linearize_model(loaded, chosen, store=output, dtype=store, progress=progress)
    click.echo(f"Wrote {output}: {len(jacobians)} Jacobians averaged over {jacobians.prompt_count} prompts")


@click.command()
@model_argument
@click.option("-o", "--output", required=True, type=click.Path(), help="The controller file to write.")
@click.option("--concept", help="A bundled contrast set (see `mlx-lqr concepts`), or the name of your own.")
@click.option(
    "--positive", type=click.Path(), help="Prompts with the concept: one a line, or JSON lines with a prompt key."
)
@click.option("--negative", type=click.Path(), help="Prompts without it.")
@click.option("--jacobians", type=click.Path(), help="Jacobians stored by `mlx-lqr linearize`.")
@click.option("--jacobian-prompts", default=8, show_default=True, help="Positive prompts to linearise at.")
@click.option(
    "--q", default=0.1, show_default=True, help="Weight of the state. Only q/r and qf/r matter; more steers harder."
)
@click.option("--r", default=1.0, show_default=True, help="Weight of the control.")
@click.option("--qf", default=0.1, show_default=True, help="Weight of the last layer's output.")
@click.option("--layers", help="Where control may act, such as 20-29; by default every layer.")
@click.option(
    "--cost",
    type=click.Choice(["state", "feature"]),
    default="state",
    show_default=True,
    help="Penalise any error of the state, or that of the concept's feature alone, which is much cheaper to fit.",
)
@click.option(
    "--positions",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help="Steer from the prompt's last token on, or every prompt token too.",
)
@loading_options
def fit(
    model: str,
    output: str,
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
    positions: Positions,
    loading: Loading,
) -> None:
    """Fit a controller for a concept on MODEL."""
    Weights(q, r, qf)  # mistakes are refused before the model is loaded
    check_writable(output)
    chosen = parse_layers(layers)
    name, positive_prompts, negative_prompts = _prompts(concept, positive, negative)
    stored = Jacobians.load(jacobians) if jacobians else None
    with progress_bars() as progress:
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
            positions=positions,
            jacobian_prompts=jacobian_prompts,
            jacobians=stored,
            progress=progress,
        )
        controller.save(output)
    click.echo(f"Wrote {output} ({Path(output).stat().st_size / 1000:.0f} kB). Try it:")
    click.echo(f"  mlx-lqr generate {model} -p 'Once upon a time,' -c {output}:2")


def _prompts(concept: str | None, positive: str | None, negative: str | None) -> tuple[str, list[str], list[str]]:
    if positive and negative:
        return concept or Path(positive).stem, read_prompts(positive), read_prompts(negative)
    if positive or negative:
        raise InputError("give both --positive and --negative")
    if not concept:
        raise InputError(
            "name a bundled --concept (see `mlx-lqr concepts`), or give --positive FILE and --negative FILE"
        )
    return concept, *bundled_prompts(concept)
