"""The tokenizers library as it fails: with exceptions of any kind, and with panics of its Rust code.

A panic is no `Exception` in Python, so that it would get past everybody who expects a damaged file, and Rust prints it
before Python hears of it. So a tokenizer is tried as soon as it is read, where what Rust prints can be left out.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenizers import Tokenizer

from mlx_lqr.errors import InputError, first_line

_TRIAL = ("", "a", "Hello world, 12\u20ac\n")
_ERRORS = 2
"""The file descriptor that Rust prints to."""
_only_one = threading.Lock()


def opened(file: Path) -> Tokenizer:
    """The tokenizer in a file.

    Raises:
        InputError: it cannot be read, or panics at the first texts that it gets.
    """
    with sound(f"{file} cannot be read"), _without_panics():
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()  # what was in force when the file was saved is no part of the model
        tokenizer.no_padding()
        for text in _TRIAL:
            with suppress(Exception):  # a vocabulary may lack these characters
                tokenizer.decode(tokenizer.encode(text).ids)
    return tokenizer


@contextmanager
def sound(what: str = "the model's tokenizer fails") -> Iterator[None]:
    """Around calls of the library.

    Raises:
        InputError: whatever it raises, in one line that begins with `what`.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise  # Ctrl-C, for one
        raise InputError(f"{what} ({first_line(error)}): download the model again") from error


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # its module cannot be imported


@contextmanager
def _without_panics() -> Iterator[None]:
    """What is written to the terminal's errors meanwhile is written afterwards, and not at all if it is of a panic."""
    with _only_one, tempfile.TemporaryFile() as kept:
        try:
            before = os.dup(_ERRORS)
        except OSError:  # there is none, as without a terminal on Windows
            yield
            return
        os.dup2(kept.fileno(), _ERRORS)
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = _is_panic(error)
            raise
        finally:
            os.dup2(before, _ERRORS)
            os.close(before)
            kept.seek(0)
            if not panicked and (said := kept.read()):
                os.write(_ERRORS, said)
