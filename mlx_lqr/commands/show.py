"""mlx-lqr show"""

from __future__ import annotations

import json
from typing import Any

import click
import numpy as np

from mlx_lqr.methods.baseline import METHODS, Baseline, Steering, load_steering


@click.command()
@click.argument("file", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def show(file: str, as_json: bool) -> None:
    """Show what a controller's FILE holds."""
    controller = load_steering(file)
    if isinstance(controller, Baseline):
        _show_baseline(controller, as_json)
        return
    gain_norm = np.linalg.norm(controller.gain, axis=1)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "model": controller.model_name,
                    "fingerprint": controller.fingerprint,
                    "concepts": controller.concepts,
                    "T": controller.num_layers,
                    "d": controller.hidden_size,
                    "q": controller.weights.q,
                    "r": controller.weights.r,
                    "qf": controller.weights.qf,
                    "layers": controller.active_layers,
                    "positions": controller.positions,
                    "cost": controller.cost,
                    "strength": controller.strength,
                    "prompt_counts": controller.prompt_counts,
                    "jacobian_prompts": controller.jacobian_prompts,
                    "library_version": controller.library_version,
                    "setpoint": controller.setpoint.tolist(),
                    "offset": controller.offset.tolist(),
                    "gain_norm": gain_norm.tolist(),
                }
            )
        )
        return
    weights = controller.weights
    counts = ", ".join(
        f"{name} ({positive} + {negative} prompts)"
        for name, (positive, negative) in zip(controller.concepts, controller.prompt_counts, strict=True)
    )
    click.echo(f"concepts   {counts}")
    click.echo(f"model      {controller.model_name} ({controller.num_layers} layers of width {controller.hidden_size})")
    click.echo(f"weights    q = {weights.q:g}, r = {weights.r:g}, qf = {weights.qf:g}, {controller.cost} cost")
    click.echo(f"positions  {controller.positions}")
    if controller.offset.any():
        click.echo("setpoint   counted from the negative prompts' level (centred)")
    _show_strength(controller)
    click.echo(f"linearised at {controller.jacobian_prompts} prompts by mlx-lqr {controller.library_version}")
    header = "".join(f"{'setpoint ' + name:>24}{'gain':>9}" for name in controller.concepts)
    click.echo(f"\nlayer{header}")
    for k in range(controller.num_layers):
        row = "".join(f"{mu:24.3f}{g:9.3f}" for mu, g in zip(controller.setpoint[k], gain_norm[k], strict=True))
        click.echo(f"{k:5d}{row}" + ("" if k in controller.active_layers else "   no control"))


def _show_strength(steering: Steering) -> None:
    if steering.strength is not None:
        click.echo(f"strength   {', '.join(f'{strength:g}' for strength in steering.strength)} (recommended)")


def _show_baseline(steering: Baseline, as_json: bool) -> None:
    axes = METHODS[steering.method].tensors
    layered = {name: part for name, part in steering.tensors.items() if axes[name][0] == "T" and "H" not in axes[name]}
    heads = _heads(steering) if "head_spread" in axes else []
    sizes = {name: np.linalg.norm(part.reshape(len(part), -1), axis=1) for name, part in layered.items()}
    if as_json:
        fields = {
            "method": steering.method,
            "model": steering.model_name,
            "fingerprint": steering.fingerprint,
            "concepts": steering.concepts,
            "T": steering.num_layers,
            "d": steering.hidden_size,
            "numbers": dict(steering.numbers),
            "layers": steering.active_layers,
            "positions": steering.positions,
            "strength": steering.strength,
            "prompt_counts": steering.prompt_counts,
            "library_version": steering.library_version,
        }
        fields["norms"] = {name: size.tolist() for name, size in sizes.items()}
        if heads:
            fields["heads"] = heads
        click.echo(json.dumps(fields))
        return
    counts = ", ".join(
        f"{name} ({positive} + {negative} prompts)"
        for name, (positive, negative) in zip(steering.concepts, steering.prompt_counts, strict=True)
    )
    click.echo(f"method     {METHODS[steering.method].title}")
    click.echo(f"concepts   {counts}")
    click.echo(f"model      {steering.model_name} ({steering.num_layers} layers of width {steering.hidden_size})")
    if steering.numbers:
        click.echo("gains      " + ", ".join(f"{name} = {number:g}" for name, number in steering.numbers.items()))
    click.echo(f"positions  {steering.positions}")
    _show_strength(steering)
    click.echo(f"fitted by mlx-lqr {steering.library_version}")
    widths = {name: max(13, len(name) + 4) for name in sizes}
    click.echo("\nlayer" + "".join(f"{'|' + name + '|':>{widths[name]}}" for name in sizes))
    for k in range(steering.num_layers):
        row = "".join(f"{size[k]:{widths[name]}.3f}" for name, size in sizes.items())
        click.echo(f"{k:5d}{row}" + ("" if k in steering.active_layers else "   no control"))
    if heads:
        click.echo("\nlayer  head  accuracy  spread  concept")
    for head in heads:
        click.echo("{layer:5d}{head:6d}{accuracy:10.3f}{spread:8.3f}  {concept}".format(**head))


def _heads(steering: Baseline) -> list[dict[str, Any]]:
    """The attention heads that ITI moves: how well their probes did, and the standard deviation they are moved by."""
    accuracy, spread = steering.tensors["head_accuracy"], steering.tensors["head_spread"]
    return [
        {
            "layer": int(k),
            "head": int(h),
            "concept": steering.concepts[i],
            "accuracy": float(accuracy[k, h, i]),
            "spread": float(spread[k, h, i]),
        }
        for k, h, i in np.argwhere(spread > 0)
    ]
