"""The standard streams of a command: any text can be written and none commands a terminal; a broken stream is one line,
not a traceback."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mlx_lqr.launched import rank

_COMMANDING = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|\r(?!\n)")
"""Control characters of C0 and C1 but for tabs and ends of lines, and those that turn the direction of what follows"""


def is_terminal(stream: Any) -> bool:
    return bool(getattr(stream, "isatty", bool)())  # None where there is no such stream


def printable(text: str, stream: Any) -> str:
    """A text as it may go to a stream: on a terminal, characters that would command it stand there as escapes.

    Models, files and tokenizers may hold any: ESC and CSI, which move, hide and colour, set titles and answer as if
    somebody typed; BEL; a lone carriage return, which writes over its line; overrides of direction. Anything but a
    terminal gets the text as it is.
    """
    if not is_terminal(stream):
        return text
    return _COMMANDING.sub(lambda match: repr(match[0])[1:-1], text)


def accept_any_text() -> None:
    """Write characters that the output's encoding lacks as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


@contextmanager
def first_process_speaks() -> Iterator[None]:
    """Of several processes under `mlx.launch`, let the first one write to the standard streams.

    On leaving this context, also by an exception, they are as before.
    """
    if rank() == 0:
        yield
        return
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def drop_output() -> None:
    """Throw away what a broken stream still holds, since Python would complain about it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):  # AttributeError: a stream that was closed from the start
            with suppress(AttributeError, OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def describe(error: OSError) -> str:
    """What went wrong with a file or, if the error names none, with the output."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else f"cannot write the output: {reason}"


def reader_has_gone(error: OSError) -> bool:
    """Whether the program that reads our output (`| head`) has ended."""
    return error.errno == errno.EPIPE


@contextmanager
def keys_unseen() -> Iterator[None]:
    """Inside this context typed keys do not show on the terminal; they can be read afterwards, Enter as Enter.

    On leaving it, also by an exception, the terminal is as it was before.
    """
    try:
        import termios
    except ImportError:  # a system without such terminals
        yield
        return
    try:
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (OSError, ValueError, termios.error):  # no terminal
        yield
        return
    quiet = [*before]
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~(termios.ECHO | termios.ECHONL)
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        if terminated is signal.SIG_DFL:  # or SIGTERM would end us without restoring the terminal
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        termios.tcsetattr(terminal, termios.TCSANOW, quiet)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
        if terminated is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, terminated)
