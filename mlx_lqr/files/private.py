"""Files that hold what somebody said: readable by their owner alone, from the moment they are made."""

from __future__ import annotations

import os
from pathlib import Path

MODE = 0o600


def only_mine(path: str, flags: int) -> int:
    """An opener (see `open`) of files that are private where it makes them."""
    return os.open(path, flags, MODE)


def others_may_open(path: str | os.PathLike[str]) -> bool:
    """Whether a file is there that others than its owner may read or write, as far as its mode says."""
    try:
        return os.name == "posix" and bool(Path(path).stat().st_mode & 0o077)
    except OSError:
        return False


def keep_private(path: str | os.PathLike[str]) -> bool:
    """Make a file private, and make it where there is none; True where others could open it before.

    Raises:
        OSError: it cannot be made or written, or belongs to somebody else.
    """
    open(path, "ab", opener=only_mine).close()
    opened = others_may_open(path)
    if opened:
        os.chmod(path, MODE)
    return opened
