"""The command line: parsing and printing, no maths. A mistake is one line on stderr and exit status 2."""

from __future__ import annotations

import sys
import warnings

import click

from mlx_lqr.commands.certify import certify
from mlx_lqr.commands.chat import chat
from mlx_lqr.commands.compare import comparison
from mlx_lqr.commands.concepts import concepts
from mlx_lqr.commands.convert import convert
from mlx_lqr.commands.demo import demo
from mlx_lqr.commands.evaluate import evaluation
from mlx_lqr.commands.fit import fit, linearize
from mlx_lqr.commands.generate import generate
from mlx_lqr.commands.linearity import linearity
from mlx_lqr.commands.lm_eval import lm_eval
from mlx_lqr.commands.show import show
from mlx_lqr.commands.tune import tuning
from mlx_lqr.errors import InputError


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except InputError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)
        except BrokenPipeError:  # the reader of our output (`| head`) has gone
            sys.stderr.close()
            ctx.exit(0)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlx-lqr")
def main() -> None:
    """Steer language models on your own machine: closed-loop activation steering (A-LQR).

    MODEL is an MLX or Hugging Face folder, a hub id, a .gguf file, or "demo".
    """
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    click.echo(f"Note: {message}", err=True)


for command in (
    demo,
    convert,
    concepts,
    linearize,
    fit,
    generate,
    chat,
    show,
    evaluation,
    comparison,
    tuning,
    linearity,
    certify,
):
    main.add_command(command)
evaluation.add_command(lm_eval)
