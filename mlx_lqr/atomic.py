"""Write a file or a folder so that it is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_lqr.errors import InputError


@contextmanager
def writing(target: str | os.PathLike[str], *, folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on a clean exit it takes the name of `target`.

    On any exception, Ctrl-C included, the temporary path is removed and what stood at `target` is untouched.

    Args:
        target: where the result is to stand. An existing file is replaced; an existing folder is not (`InputError`).
        folder: make a folder (it exists when yielded) rather than a file (it does not).

    Raises:
        InputError: the place cannot be written, or the disk is full.
    """
    target = Path(target)
    holder = _place_beside(target, folder)
    temporary = holder / target.name
    try:
        if folder:
            temporary.mkdir()
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}; nothing was changed") from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def check_writable(target: str | os.PathLike[str]) -> None:
    """Raise `InputError` now, before long work, where a file could not be written at `target` afterwards."""
    _place_beside(Path(target), folder=False).rmdir()


def _place_beside(target: Path, folder: bool) -> Path:
    """A new empty folder beside `target`, on the same file system."""
    if folder and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists already: name another place, or remove it first")
    if not folder and target.is_dir():
        raise InputError(f"{target} is a folder: name a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error


def _flush(path: Path) -> None:
    """Force the bytes of `path` to the disk, so that a full disk is noticed before the rename and not after it."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
