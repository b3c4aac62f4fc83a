"""mlx-lqr show"""

from __future__ import annotations

import json
from collections.abc import Iterator

import click

from mlx_lqr.commands.help import argument, command
from mlx_lqr.commands.options import json_option
from mlx_lqr.commands.output import say
from mlx_lqr.files.results import as_json as to_json
from mlx_lqr.loading import load_steering
from mlx_lqr.lqr.strength import BUDGETS
from mlx_lqr.methods.method import Shown
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.steering import Steering


@command()
@argument("file", type=click.Path(), help="What `mlx-lqr fit` or `mlx-lqr tune` wrote, or a control vector.")
@json_option("Print all of it as JSON, for scripts.")
def show(file: str, as_json: bool) -> None:
    """Show what a controller file holds."""
    steering = load_steering(file)
    shown = METHODS[steering.method].show(steering)
    if as_json:
        say(json.dumps({**_fields(steering), **shown.fields}))
        return
    for label, text in _rows(steering, shown).items():
        say(f"{label:<11}{text}")
    say(f"{shown.fitted} by mlx-lqr {steering.library_version}")
    _print_layers(steering, shown)
    for line in shown.lines:
        say(line)


def _fields(steering: Steering) -> dict[str, object]:
    """What JSON tells of every file."""
    return {
        "method": steering.method,
        "model": steering.model_name,
        "fingerprint": steering.fingerprint,
        "concepts": steering.concepts,
        "T": steering.num_layers,
        "d": steering.hidden_size,
        "layers": steering.active_layers,
        "positions": steering.positions,
        "strength": steering.strength,
        "calibration": to_json(steering.calibration or [None] * len(steering.concepts)),
        "prompt_counts": steering.prompt_counts,
        "library_version": steering.library_version,
    }


def _rows(steering: Steering, shown: Shown) -> dict[str, str]:
    """Label -> text, in the order in which they are printed."""
    counts = ", ".join(
        f"{name} ({positive} + {negative} prompts)" if positive or negative else name
        for name, (positive, negative) in zip(steering.concepts, steering.prompt_counts, strict=True)
    )
    rows = {
        **({"method": shown.title} if shown.title is not None else {}),
        "concepts": counts,
        "model": f"{steering.model_name} ({steering.num_layers} layers of width {steering.hidden_size})",
        **shown.numbers,
        "positions": steering.positions,
        **shown.notes,
    }
    if steering.strength is not None:
        rows["strength"] = f"{', '.join(f'{strength:g}' for strength in steering.strength)} (recommended)"
    if steering.calibration:
        rows["budgets"] = "; ".join(_budgets(steering))
    return rows


def _budgets(steering: Steering) -> Iterator[str]:
    """Of each concept that is calibrated its strengths, and the divergence measured there."""
    for concept, one in zip(steering.concepts, steering.calibration, strict=True):
        if one is not None:
            parts = ", ".join(f"{name} {one.strength[name]:g} ({one.divergence[name]:.2g} nats)" for name in BUDGETS)
            yield f"{concept}: {parts}" if len(steering.concepts) > 1 else parts


def _print_layers(steering: Steering, shown: Shown) -> None:
    say("\nlayer" + "".join(f"{column.header:>{column.width}}" for column in shown.columns))
    for k in range(steering.num_layers):
        row = "".join(f"{column.values[k]:{column.width}.3f}" for column in shown.columns)
        say(f"{k:5d}{row}" + ("" if k in steering.active_layers else "   no control"))
