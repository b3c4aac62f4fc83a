"""The standard streams of a command: any text can be written to them, and what breaks them is one line."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

STOPPED = 128 + 2
"""Exit status after Ctrl-C: as a shell reports a program that SIGINT has ended."""


def accept_any_text() -> None:
    """Write characters that an output's encoding does not have as escapes, where they would be an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Let what a broken stream still holds go nowhere: Python would complain of it when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):  # the first of a stream that was closed from the start
            with suppress(AttributeError, OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def describe(error: OSError) -> str:
    """What went wrong with a file or, where none is named, with the output."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else f"cannot write the output: {reason}"


def reader_has_gone(error: OSError) -> bool:
    """Whether the reader of our output (`| head`) has."""
    return error.errno == errno.EPIPE


@contextmanager
def keys_unseen() -> Iterator[None]:
    """Inside this context keys that are typed do not appear on the terminal; they are read afterwards.

    The terminal is as it was when the context is left, also by an exception.
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
    quiet[3] &= ~(termios.ECHO | termios.ECHONL)
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        if terminated is signal.SIG_DFL:  # which would end us without what follows
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        termios.tcsetattr(terminal, termios.TCSANOW, quiet)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
        if terminated is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, terminated)
