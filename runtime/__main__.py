"""`python -m mlx_lqr.runtime MODEL -p TEXT -c FILE`: run a model with a controller, and need little for it.

A GGUF file runs in llama.cpp, as it is, with nothing installed but

    pip install llama-cpp-python
    pip install --no-deps mlx-lqr

of whose dependencies numpy is used, and jinja2 with --chat. A folder in MLX's format runs in MLX, and imports mlx,
numpy, safetensors, tokenizers and jinja2. mlx-lm has to be there as well, since the model's own code is a file of its
`mlx_lm.models`; that file is read without the package's `__init__`, so mlx-lm needs none of its dependencies:

    pip install "mlx[cpu]" numpy safetensors tokenizers jinja2    # on macOS: mlx
    pip install --no-deps mlx-lm mlx-lqr

On Linux, `pip install mkl` (x86-64) or OpenBLAS makes long prompts many times faster there.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NoReturn, get_args

from mlx_lqr.backends.protocol import Sampling
from mlx_lqr.errors import InputError
from mlx_lqr.loading import BackendName, load, running_backend
from mlx_lqr.lqr.strength import Budget
from mlx_lqr.methods.running import adapts
from mlx_lqr.runtime import Chat, Options, Piece, stream
from mlx_lqr.runtime.arguments import (
    ADAPTER_HELP,
    BACKEND_HELP,
    BUDGET_HELP,
    DECODING_HELP,
    DTYPE_DEFAULT,
    STRENGTH_HELP,
    given_or_piped,
    load_controllers,
    parse_controller,
    with_budget,
)
from mlx_lqr.runtime.decode import Overflow
from mlx_lqr.runtime.streams import (
    accept_any_text,
    describe,
    drop_output,
    first_process_speaks,
    is_terminal,
    printable,
    reader_has_gone,
)
from mlx_lqr.starting import STOPPED, interruptible


def main(arguments: Sequence[str] | None = None) -> int:
    """Stream the answer to stdout and return the exit status: 2 for a mistake, which is one line on stderr."""
    warnings.showwarning = _show_warning
    accept_any_text()
    try:
        with interruptible(), first_process_speaks():
            _generate(_parser().parse_args(arguments))
    except InputError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        return _refuse(f"this needs the package {error.name}, which is not installed: pip install {error.name}")
    except KeyboardInterrupt:
        return STOPPED
    except OSError as error:
        status = 0 if reader_has_gone(error) else _refuse(describe(error))
        drop_output()
        return status
    return 0


def _generate(given: argparse.Namespace) -> None:
    talks = given.chat and given.prompt is None and is_terminal(sys.stdin)
    text = "" if talks else given_or_piped(given.prompt)
    choices = with_budget([parse_controller(text) for text in given.controllers], given.budget)
    controller, strengths = load_controllers(choices, given.model)
    as_it_is = given.dtype is None and given.adapter is None
    as_it_is = as_it_is and not adapts(controller)
    backend = running_backend(given.model, given.backend, as_it_is=as_it_is)
    model = load(given.model, backend=backend, dtype=given.dtype, adapter=given.adapter)
    options: Options = {name: getattr(given, name) for name in Options.__annotations__ if hasattr(given, name)}  # type: ignore[assignment]
    if talks:
        chat = Chat(model, options=options)
        if controller is not None:
            chat.add(controller, strengths)
        _talk(chat)
        return
    if controller is not None:
        options |= {"controller": controller, "strength": strengths}
    prompt = model.tokenizer.chat([{"role": "user", "content": text}]) if given.chat else text
    _print(stream(model, prompt, **options))


def _talk(chat: Chat) -> None:
    """Answer what is typed, until the end of the input (Ctrl-D)."""
    with suppress(EOFError):
        while True:
            if text := input("> ").strip():
                _print(chat.answer(text))
    print(flush=True)


def _print(pieces: Iterable[Piece]) -> None:
    for piece in pieces:
        print(printable(piece.text, sys.stdout), end="", flush=True)
    print(flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _parser() -> argparse.ArgumentParser:
    """The options of `mlx_lqr.Options` that are plain values go under its names, and are absent where not given."""
    parser = _Parser(
        prog="python -m mlx_lqr.runtime",
        description="Continue a text, or talk with a model, steered or not.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("model", help='A .gguf file, a folder with config.json and safetensors, or "demo".')
    add("-p", "--prompt", default=None, help="The text to continue; without it, what comes through a pipe.")
    add(
        "--chat",
        action="store_true",
        default=False,
        help="Put the text as a message into the model's chat template; without one, talk in the terminal.",
    )
    add("--backend", choices=get_args(BackendName), default="auto", help=BACKEND_HELP)
    add(
        *("-c", "--controller"),
        dest="controllers",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="Steer with the controller in FILE at STRENGTH; without one, at the strength that the file recommends, "
        f"or 1. {STRENGTH_HELP} Repeat it for several at once.",
    )
    add("--budget", choices=get_args(Budget), default=None, help=BUDGET_HELP)

    def decoding(*names: str, **kind: Any) -> None:
        name = names[-1].strip("-").replace("-", "_")
        default = getattr(Sampling, name, None)
        add(*names, help=DECODING_HELP[name] + (f" [default: {default}]" if default is not None else ""), **kind)

    decoding("-n", "--max-tokens", type=int)
    decoding("--temperature", type=float)
    decoding("--top-p", type=float)
    decoding("--top-k", type=int)
    decoding("--min-p", type=float)
    decoding("--repetition-penalty", type=float)
    decoding("--frequency-penalty", type=float)
    decoding("--presence-penalty", type=float)
    decoding("--seed", type=int)
    decoding("--stop", action="append", metavar="TEXT")
    decoding("--overflow", choices=get_args(Overflow))
    add("--dtype", default=None, help=f"float32, float16 or bfloat16; {DTYPE_DEFAULT}")
    add("--adapter", default=None, metavar="FOLDER", help=ADAPTER_HELP)
    return parser


def _refuse(reason: str) -> int:
    with suppress(OSError):
        print(printable(f"Error: {reason}", sys.stderr), file=sys.stderr)
    return 2


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(printable(f"Note: {message}", sys.stderr), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
