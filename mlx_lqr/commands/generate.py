"""mlx-lqr generate"""

from __future__ import annotations

import json
import sys

import click

from mlx_lqr.commands.options import (
    adaptive_option,
    controller_option,
    dtype_option,
    model_argument,
    parse_controllers,
    progress_bars,
)
from mlx_lqr.errors import InputError
from mlx_lqr.loading import load
from mlx_lqr.runtime import stream
from mlx_lqr.synthesis import adapt


@click.command()
@model_argument
@click.option("-p", "--prompt", help="The text to continue; read from a pipe where not given.")
@controller_option
@adaptive_option
@click.option("-n", "--max-tokens", default=256, show_default=True, help="Tokens at most.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token each time.")
@click.option(
    "--top-p", default=1.0, show_default=True, help="Sample from the likeliest tokens with this total probability."
)
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@dtype_option
def generate(
    model: str,
    prompt: str | None,
    controllers: tuple[str, ...],
    adaptive: bool,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    as_json: bool,
    dtype: str | None,
) -> None:
    """Continue a text, steered or not. No chat template is applied: see `mlx-lqr chat` for that."""
    if prompt is None and sys.stdin.isatty():
        raise InputError("give the text to continue: -p TEXT, or through a pipe")
    text = prompt if prompt is not None else sys.stdin.read()
    controller, strengths = parse_controllers(controllers)
    with progress_bars() as progress:
        loaded = load(model, dtype=dtype, progress=progress)
    if adaptive and controller:
        controller = adapt(loaded, controller, text)
    pieces = stream(
        loaded,
        text,
        controller=controller,
        strength=strengths if controller else 1.0,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    tokens = []
    for piece in pieces:
        tokens.append(piece.token)
        if not as_json:
            click.echo(piece.text, nl=False)
    if not as_json:
        click.echo()
        return
    answer = {"model": loaded.name, "prompt": text, "text": loaded.tokenizer.decode(tokens), "tokens": tokens}
    if controller:
        answer["concepts"] = dict(zip(controller.concepts, strengths, strict=True))
    click.echo(json.dumps(answer))
