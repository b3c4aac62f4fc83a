"""mlx-lqr convert"""

from __future__ import annotations

import click

from mlx_lqr.commands.options import NOTHING_WRITTEN, force_option, progress_bars, stopping


@click.command()
@click.argument("source")
@click.argument("out", type=click.Path())
@click.option("--dtype", help="float32, float16 or bfloat16; by default the source's own.")
@click.option("--quantize", type=int, help="Pack the weights in this many bits: 4 or 8.")
@force_option
def convert(source: str, out: str, dtype: str | None, quantize: int | None, force: bool) -> None:
    """Convert SOURCE to an MLX model folder OUT, which mlx-lm loads too.

    SOURCE is a Hugging Face folder, a hub id, a .gguf file of the Llama, Qwen2/3 or Gemma 2/3 families, or "demo".
    """
    from mlx_lqr.convert import convert as convert_model

    with stopping(NOTHING_WRITTEN), progress_bars() as progress:
        folder = convert_model(source, out, dtype=dtype, quantize=quantize, force=force, progress=progress)
    click.echo(f"Wrote {folder}")
