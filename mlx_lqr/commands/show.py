"""mlx-lqr show"""

from __future__ import annotations

import json

import click
import numpy as np

from mlx_lqr.controller import Controller


@click.command()
@click.argument("file", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def show(file: str, as_json: bool) -> None:
    """Show what a controller FILE holds."""
    controller = Controller.load(file)
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
    click.echo(f"linearised at {controller.jacobian_prompts} prompts by mlx-lqr {controller.library_version}")
    header = "".join(f"{'setpoint ' + name:>24}{'gain':>9}" for name in controller.concepts)
    click.echo(f"\nlayer{header}")
    for k in range(controller.num_layers):
        row = "".join(f"{mu:24.3f}{g:9.3f}" for mu, g in zip(controller.setpoint[k], gain_norm[k], strict=True))
        click.echo(f"{k:5d}{row}" + ("" if k in controller.active_layers else "   no control"))
