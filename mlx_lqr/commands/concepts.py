"""mlx-lqr concepts: the bundled contrast sets."""

from __future__ import annotations

import json

from mlx_lqr.commands.help import command
from mlx_lqr.commands.options import json_option
from mlx_lqr.commands.output import say
from mlx_lqr.concepts import bundled_concepts, bundled_prompts


@command()
@json_option()
def concepts(as_json: bool) -> None:
    """List the bundled contrast sets.

    Each with its number of prompts, and one prompt with the concept (+) and one without it (-).
    """
    sets = {name: bundled_prompts(name) for name in bundled_concepts()}
    if as_json:
        rows = [
            {"concept": name, "positive": positive, "negative": negative} for name, (positive, negative) in sets.items()
        ]
        say(json.dumps(rows))
        return
    for name, (positive, negative) in sets.items():
        say(f"{name}  ({len(positive)} + {len(negative)} prompts)\n  + {positive[0]}\n  - {negative[0]}")
