"""mlx-lqr concepts"""

from __future__ import annotations

import json

import click

from mlx_lqr.concepts import bundled_concepts, bundled_prompts


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def concepts(as_json: bool) -> None:
    """List the bundled contrast sets, with an example of each."""
    sets = {name: bundled_prompts(name) for name in bundled_concepts()}
    if as_json:
        rows = [
            {"concept": name, "positive": positive, "negative": negative} for name, (positive, negative) in sets.items()
        ]
        click.echo(json.dumps(rows))
        return
    for name, (positive, negative) in sets.items():
        click.echo(f"{name}  ({len(positive)} + {len(negative)} prompts)\n  + {positive[0]}\n  - {negative[0]}")
