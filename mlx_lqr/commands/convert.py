"""mlx-lqr convert: a model in another format becomes an MLX folder."""

from __future__ import annotations

import click

from mlx_lqr.commands.help import OUTPUT, argument, command, option
from mlx_lqr.commands.options import dtype_option, force_option
from mlx_lqr.commands.output import say
from mlx_lqr.commands.progress import NOTHING_WRITTEN, progress_bars, stopping
from mlx_lqr.launched import refuse_several


@command()
@argument(
    "source",
    help='A Hugging Face folder, a hub id, a .gguf file (any of them, if the model is in parts), or "demo".',
)
@argument("out", type=click.Path(), help="The folder to write.")
@option("--quantize", type=int, metavar="BITS", heading=OUTPUT, help="Pack the weights in this many bits: 4 or 8.")
@dtype_option("by default the source's own.", heading=OUTPUT)
@force_option
def convert(source: str, out: str, dtype: str | None, quantize: int | None, force: bool) -> None:
    """Convert a model to an MLX folder.

    mlx-lm loads the folder too.
    """
    from mlx_lqr.convert import convert as convert_model

    refuse_several("models are converted")
    with stopping(NOTHING_WRITTEN), progress_bars() as progress:
        folder = convert_model(source, out, dtype=dtype, quantize=quantize, force=force, progress=progress)
    say(f"Wrote {folder}")
