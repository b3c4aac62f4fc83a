"""The command line: parsing and printing, no maths. A mistake is one line on stderr and exit status 2."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from mlx_lqr import launched
from mlx_lqr.commands.certify import certify
from mlx_lqr.commands.chat import chat
from mlx_lqr.commands.check import check
from mlx_lqr.commands.compare import compare_group
from mlx_lqr.commands.concepts import concepts
from mlx_lqr.commands.convert import convert
from mlx_lqr.commands.demo import demo
from mlx_lqr.commands.evaluate import eval_group
from mlx_lqr.commands.export import export
from mlx_lqr.commands.fit import fit, linearize
from mlx_lqr.commands.generate import generate
from mlx_lqr.commands.help import Group
from mlx_lqr.commands.linearity import linearity
from mlx_lqr.commands.lm_eval import lm_eval
from mlx_lqr.commands.output import say
from mlx_lqr.commands.push import push
from mlx_lqr.commands.serve import serve
from mlx_lqr.commands.show import show
from mlx_lqr.commands.tune import tuning
from mlx_lqr.errors import InputError
from mlx_lqr.runtime.streams import (
    accept_any_text,
    describe,
    drop_output,
    first_process_speaks,
    printable,
    reader_has_gone,
)
from mlx_lqr.starting import STOPPED, interruptible


class _Main(Group):
    def main(self, *args: Any, **kwargs: Any) -> Any:
        accept_any_text()
        try:
            with first_process_speaks():
                return super().main(*args, **kwargs)
        except OSError as error:  # of what click itself writes, such as --help
            sys.exit(_broken(error))

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _printable_refusals():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> object:
        try:
            with interruptible(), _printable_refusals():
                return super().invoke(ctx)
        except InputError as error:
            _say(f"Error: {error}")
            ctx.exit(2)
        except RuntimeError as error:
            if launched.count() == 1 or "peer" not in str(error):
                raise
            _say("Error: the connection to another machine was lost: its message, if there is one, says why")
            ctx.exit(2)
        except KeyboardInterrupt as stop:
            if launched.rank() == 0:
                _say(str(stop) or "Stopped.")
            ctx.exit(STOPPED)
        except OSError as error:
            ctx.exit(_broken(error))


@contextmanager
def _printable_refusals() -> Iterator[None]:
    """What click refuses, it prints itself."""
    try:
        yield
    except click.ClickException as error:
        error.message = printable(error.message, sys.stderr)  # type: ignore[misc]
        raise


def _broken(error: OSError) -> int:
    """Say what is wrong if anybody still reads it, and return the exit status."""
    if not reader_has_gone(error):
        _say(f"Error: {describe(error)}")
    drop_output()
    return 0 if reader_has_gone(error) else 2


def _say(line: str) -> None:
    """Of several processes each says what the first one does not: that one ends first, and the others with it."""
    with suppress(OSError):
        if launched.rank() > 0:
            threading.Event().wait(FIRST_ENDS)
            say(f"{line} (on rank {launched.rank()})", file=sys.__stderr__)
        else:
            say(line, err=True)


FIRST_ENDS = 5.0
"""Seconds in which `mlx.launch` ends all processes after the first one has ended with an error."""


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlx-lqr")
def main() -> None:
    """Steer language models on your own machine, in closed loop (A-LQR).

    MODEL, which most commands take, is an MLX or Hugging Face folder, a hub id, a .gguf file, or "demo".
    """
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    say(f"Note: {message}", err=True)


main.add_section("Start here", [demo, check, concepts])
main.add_section("Fit a controller", [fit, tuning, linearize])
main.add_section("Steer a model", [generate, chat, serve])
main.add_section("Measure", [eval_group, compare_group, linearity, certify])
main.add_section("Files", [show, convert, export, push])
eval_group.add_command(lm_eval)
