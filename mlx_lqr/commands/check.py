"""mlx-lqr check: what a model is, whether it can be steered, and how fast."""

from __future__ import annotations

import json

from mlx_lqr.analysis.check import Check, Speed
from mlx_lqr.analysis.check import check as look_at
from mlx_lqr.backends import registry
from mlx_lqr.commands.help import command
from mlx_lqr.commands.options import Loading, json_option, loading_options, model_argument
from mlx_lqr.commands.output import say
from mlx_lqr.commands.progress import progress_bars
from mlx_lqr.files.results import as_json as to_json
from mlx_lqr.launched import refuse_several
from mlx_lqr.loading import load

UNITS = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand"))
GIB, MIB = 1 << 30, 1 << 20


@command()
@model_argument
@json_option()
@loading_options
def check(model: str, as_json: bool, loading: Loading) -> None:
    """Check that a model can be steered.

    Its derivatives are measured against its own response; a model that is too far off is refused with the number. Also
    shown: its size, where it computes, and how fast.
    """
    refuse_several("a model is checked, and its speed measured,")
    with progress_bars() as progress:
        found = look_at(load(model, **loading, progress=progress), progress=progress)
    if as_json:
        say(json.dumps(to_json(found)))
        return
    for label, text in _rows(found):
        say(f"{label:<10}{text}")


def _rows(found: Check) -> list[tuple[str, str]]:
    """Label and text, in the order in which they are printed."""
    described = found.description
    packed = f", packed in {described.packing}" if described.packing else ""
    length = described.context_length
    template = {True: "yes", False: "none, so `mlx-lqr chat` cannot be used", None: "unknown"}
    rows = [
        ("model", f"{found.model_name}, {found.num_layers} layers of width {found.hidden_size}"),
        ("size", f"{_count(described.parameters)} parameters{packed}, {_memory(described.nbytes)}"),
        ("computes", f"{registry.backend(found.backend).title} on {described.device}, in {described.dtype}"),
        ("words", f"{found.vocab_size} tokens; chat template: {template[found.has_chat_template]}"),
        ("context", f"{length} tokens" if length is not None else "config.json does not say how long: no end"),
    ]
    if (measured := found.measurement) is not None:
        rows.append(("steering", "works" if measured.is_exact else "works, less exactly (see the note)"))
        rows += [("", line) for line in measured.findings]
    return [*rows, *_speed(found.speed)]


def _speed(speed: Speed) -> list[tuple[str, str]]:
    rows = [("speed", f"reads {_rate(speed.reading)} tokens a second, writes {_rate(speed.writing)}")]
    if speed.feature_cost is not None and speed.state_cost is not None:
        seconds = f"{speed.feature_cost:.2g} s with the feature cost, {speed.state_cost:.2g} s with the state cost"
        rows.append(("fitting", f"{seconds}, for each prompt whose Jacobians are taken"))
    return rows


def _rate(seconds: float) -> str:
    return f"{1 / seconds:.0f}" if seconds < 0.01 else f"{1 / seconds:.3g}"


def _count(number: int) -> str:
    for size, unit in UNITS:
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _memory(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.0f} MiB"
