"""Write a file or a folder whole or not at all, and replace only what is of the same kind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from mlx_lqr.errors import InputError
from mlx_lqr.files.json_text import parse_json
from mlx_lqr.files.tensors import read_format
from mlx_lqr.launched import rank

Kind = Literal["controller", "Jacobians", "transcript", "results", "PNG image", "SVG image"]
"""What this library writes for its user. The steering of other methods is of the kind "controller" too."""

_FORMATS: dict[str, Kind] = {
    "mlx-lqr controller": "controller",
    "mlx-lqr baseline": "controller",
    "mlx-lqr jacobians": "Jacobians",
}
_RESULTS = {"strengths", "methods", "certified_band", "singular_values"}
"""Every file of results has one of these keys."""


@contextmanager
def writing(
    target: str | os.PathLike[str], *, folder: bool = False, kind: Kind | None = None, force: bool = False
) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on a clean exit it takes the name of `target`.

    On any exception, also Ctrl-C, the temporary path is removed and `target` is untouched.

    Of several processes under `mlx.launch` the first writes its user's files; what the others write goes nowhere.

    Args:
        target: the path to write, or a link to it. An existing file is replaced if it is of this `kind` (or of any, if
            `kind` is None), an existing folder only if it is empty.
        folder: write a folder (it exists when yielded) instead of a file (which does not).
        kind: what will be written, for its user; None for what the library keeps for itself.
        force: also replace a file of another kind, or a folder that holds a model.

    Raises:
        InputError: `target` may not be replaced or cannot be written, or the disk is full.
    """
    if kind is not None and rank() > 0:
        with tempfile.TemporaryDirectory() as place:
            yield Path(place) / Path(target).name
        return
    target = followed(target)
    _check_replaceable(target, folder, kind, force)
    holder = _place_beside(target)
    temporary = holder / target.name
    try:
        if folder:
            temporary.mkdir()
        yield temporary
        _flush(temporary)
        if folder and target.exists():
            _exchange(temporary, target, holder / "old")
        else:
            os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}; nothing was changed") from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _exchange(new: Path, target: Path, old: Path) -> None:
    """Move the folder `target` to `old` and `new` to `target`. If that fails, `target` is moved back."""
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise


def check_writable(target: str | os.PathLike[str], kind: Kind | None = None, *, force: bool = False) -> None:
    """Raise `InputError` if `target` cannot be written: to know before long work, not after it."""
    if rank() > 0:  # does not write it
        return
    target = followed(target)
    _check_replaceable(target, False, kind, force)
    _place_beside(target).rmdir()


def kind_of(path: str | os.PathLike[str]) -> Kind | None:
    """The kind of a file that this library wrote; None for any other file."""
    stated = read_format(path)
    for prefix, kind in _FORMATS.items():
        if stated.startswith(prefix):
            return kind
    try:
        with open(path, "rb") as file:
            head = file.read(1024).lstrip()
            if head.startswith(b"\x89PNG"):
                return "PNG image"
            if head.startswith((b"<?xml", b"<svg")) and b"<svg" in head:
                return "SVG image"
            entries = parse_json((head + file.read()).decode()) if head.startswith(b"{") else None
    except (OSError, ValueError):
        return None
    if not isinstance(entries, dict):
        return None
    if {"model", "strengths", "messages"} <= entries.keys():
        return "transcript"
    return "results" if _RESULTS & entries.keys() else None


def _check_replaceable(target: Path, folder: bool, kind: Kind | None, force: bool) -> None:
    """Raise `InputError` if `target` exists and may not be replaced."""
    if not target.exists():
        return
    if folder:
        empty = target.is_dir() and not any(target.iterdir())
        if not empty and not (force and (target / "config.json").is_file()):
            raise InputError(
                f"{target} exists already: name another place, or remove it first (--force replaces a model's folder)"
            )
        return
    if target.is_dir():
        raise InputError(f"{target} is a folder: name a file")
    if not target.is_file():
        raise InputError(f"{target} is no file but a device: name a file")
    if kind is not None and not force and target.stat().st_size and kind_of(target) != kind:
        raise InputError(
            f"{target} exists and is not {_NAMES[kind]} of mlx-lqr: name another file, or replace it with --force"
        )


_NAMES: dict[Kind, str] = {
    "controller": "a controller",
    "Jacobians": "a file of Jacobians",
    "transcript": "a transcript",
    "results": "a file of results",
    "PNG image": "a PNG image",
    "SVG image": "an SVG image",
}


def followed(target: str | os.PathLike[str]) -> Path:
    """The file that a link points to, so that the file is replaced and not the link."""
    return Path(os.path.realpath(target)) if os.path.islink(target) else Path(target)


def _place_beside(target: Path) -> Path:
    """A new empty folder beside `target`, on the same file system."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error


def _flush(path: Path) -> None:
    """Force the bytes of `path` to the disk, so that a full disk shows before the rename and not after it."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
