"""One writer at a time: a lock beside what is written, held for as long as the work on it takes.

The lock is the operating system's own, on a hidden file, so that it ends with the process however that ends; the file
itself is removed afterwards. It holds between processes and between threads. A thread that has it may take it again.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_lqr.errors import InputError
from mlx_lqr.launched import rank

_WINDOWS = os.name == "nt"
_POLLING = 0.05
"""Seconds between two looks at a lock that somebody else holds"""


class _Held(threading.local):
    """The locks of this thread."""

    def __init__(self) -> None:
        self.paths: set[str] = set()


_held = _Held()


@contextmanager
def locked(
    target: str | os.PathLike[str],
    *,
    patience: float = 0.0,
    waiting: Callable[[], None] | None = None,
    taken: str | None = None,
) -> Iterator[None]:
    """Inside this context nobody else who asks for the lock of `target` gets it.

    Of several processes under `mlx.launch` the first alone takes it, since it alone writes.

    Args:
        target: the file or folder that is to be written, or a link to it. Its folder is made if there is none.
        patience: how many seconds to wait for another one who has the lock; infinite for as long as it takes.
        waiting: called once if there is something to wait for.
        taken: what to say where another one has the lock.

    Raises:
        InputError: another one has the lock, or the place cannot be written.
    """
    path = followed(target)
    if rank() > 0:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error
    file = os.path.join(os.path.realpath(path.parent), f".{path.name}.lock")
    if file in _held.paths:
        yield
        return
    taken = taken or f"another mlx-lqr writes {path}: wait for it, or name another output (-o)"
    with _lock_on(file, path, patience, waiting, taken):
        _held.paths.add(file)
        try:
            yield
        finally:
            _held.paths.discard(file)


@contextmanager
def _lock_on(
    file: str, target: Path, patience: float, waiting: Callable[[], None] | None, taken: str
) -> Iterator[None]:
    from filelock import FileLock, Timeout  # the minimal runtime does without

    if os.path.islink(file):
        raise InputError(f"cannot write {target}: {file} is a link, which is not followed: remove it")
    # A file that we remove while we have its lock is let go by whoever waits for it; filelock removes it on Windows.
    lock = FileLock(file, preserve_lock_file=not _WINDOWS)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if patience <= 0:
                raise
            if waiting is not None:
                waiting()
            lock.acquire(timeout=-1 if math.isinf(patience) else patience, poll_interval=_POLLING)
    except Timeout:
        raise InputError(taken) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {target}, of which {file} is the lock: {reason}") from error
    try:
        yield
    finally:
        if not _WINDOWS:
            with suppress(OSError):
                os.unlink(file)
        lock.release()


def followed(target: str | os.PathLike[str]) -> Path:
    """The file that a link points to, so that the file is replaced and not the link."""
    return Path(os.path.realpath(target)) if os.path.islink(target) else Path(target)
