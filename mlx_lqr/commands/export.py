"""mlx-lqr export: a controller in a format of other programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np

from mlx_lqr.commands.help import OUTPUT, STEERING, argument, command, option
from mlx_lqr.commands.options import MODEL_HELP, Loading, force_option, json_option, loading_options
from mlx_lqr.commands.output import say
from mlx_lqr.commands.progress import NOTHING_WRITTEN, progress_bars, stopping
from mlx_lqr.files.atomic import reserved, writing
from mlx_lqr.files.control_vectors import write_control_vectors
from mlx_lqr.launched import refuse_several
from mlx_lqr.loading import load, load_steering
from mlx_lqr.lqr.strength import default_strength
from mlx_lqr.runtime.arguments import STRENGTH_HELP, asked_strength, parse_strength
from mlx_lqr.sharing.open_loop import OpenLoop, open_loop


@command()
@argument("file", help="The controller file, of any method, or hf:REPO/FILE.")
@argument("model", required=False, help=f"{MODEL_HELP} A-LQR needs it.")
@option(
    "--control-vector",
    "output",
    type=click.Path(),
    metavar="OUT",
    required=True,
    heading=OUTPUT,
    help="The .gguf file to write, for llama.cpp and repeng.",
)
@option(
    "--strength",
    metavar="STRENGTH",
    heading=STEERING,
    help=f"The strength that the vector is to have at scale 1; by default what the file recommends, or 1. "
    f"{STRENGTH_HELP}",
)
@force_option
@json_option("Print what was written and measured as JSON.")
@loading_options
def export(
    file: str, model: str | None, output: str, strength: str | None, force: bool, as_json: bool, loading: Loading
) -> None:
    """Write a control vector for llama.cpp.

    And for repeng: vectors that are added at each layer, the same for every text. Methods that add vectors are exported
    exactly; of A-LQR its mean push on neutral text, and how much of its control that leaves is measured.
    """
    refuse_several("controllers are exported")
    asked = None if strength is None else parse_strength(strength, "write --strength 2")
    steering = load_steering(file, model or "MODEL")
    numbers = default_strength(steering) if asked is None else asked_strength(steering, asked)
    with reserved(output, "control vector", force=force), stopping(NOTHING_WRITTEN), progress_bars() as progress:
        loaded = None if model is None else load(model, **loading, progress=progress)
        opened = open_loop(steering, numbers, loaded, progress=progress)
        with writing(output, kind="control vector", force=force) as temporary:
            write_control_vectors(temporary, opened.vectors)
    if as_json:
        say(json.dumps(_fields(opened, output, dict(zip(steering.concepts, numbers, strict=True)))))
        return
    layers, size = sorted(opened.vectors.directions), Path(output).stat().st_size / 1000
    say(f"Wrote {output} ({size:.0f} kB): {opened.vectors.description}, at layers {', '.join(map(str, layers))}")
    for line in _doubts(opened):
        say(f"Note: {line}", err=True)
    if opened.left is not None:
        say(
            f"On {opened.left.sentences} other neutral sentences {opened.left.share:.0%} of the closed loop's effect "
            f"on the next token is left; the closed loop moves it by {opened.left.closed:.3g} nats, the vector by "
            f"{opened.left.vector:.3g}"
        )
    say(
        f"Try it:\n  llama-cli -m MODEL.gguf --control-vector {output}\n  mlx-lqr generate {model or 'MODEL'} "
        f"-p 'Once upon a time,' -c {output}"
    )


def _doubts(opened: OpenLoop) -> list[str]:
    doubts = []
    if opened.left_out:
        doubts.append(
            f"the push at layer 0 (of length {opened.left_out:.3g}) is left out: the format has no place for it"
        )
    if not opened.everywhere:
        doubts.append("this steers from the prompt's last token on; programs add a control vector at every token")
    return doubts


def _fields(opened: OpenLoop, output: str, strength: dict[str, float]) -> dict[str, object]:
    vectors = opened.vectors
    return {
        "file": output,
        "model_hint": vectors.model_hint,
        "strength": strength,
        "layers": sorted(vectors.directions),
        "norms": [float(np.linalg.norm(vectors.directions[k])) for k in sorted(vectors.directions)],
        "exact": opened.left is None and not opened.left_out,
        "positions": "all" if opened.everywhere else "last",
        "left_out": opened.left_out,
        "left": None if opened.left is None else asdict(opened.left),
    }
