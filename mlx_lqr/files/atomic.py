"""Write a file or a folder whole or not at all, and replace only what is of the same kind."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

from mlx_lqr.errors import InputError
from mlx_lqr.files.json_text import parse_json
from mlx_lqr.files.locks import followed, locked
from mlx_lqr.files.tensors import read_format
from mlx_lqr.launched import rank

Kind = Literal["controller", "control vector", "Jacobians", "transcript", "results", "PNG image", "SVG image"]
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

    On any exception, also Ctrl-C, the temporary path is removed and `target` is untouched. What a process left that was
    killed is removed by the next one that writes there.

    Of several processes under `mlx.launch` the first writes its user's files; what the others write goes nowhere.

    Args:
        target: the path to write, or a link to it. An existing file is replaced if it is of this `kind` (or of any, if
            `kind` is None), an existing folder only if it is empty.
        folder: write a folder (it exists when yielded) instead of a file (which does not).
        kind: what will be written, for its user; None for what the library keeps for itself.
        force: also replace a file of another kind, or a folder that holds a model.

    Raises:
        InputError: `target` may not be replaced or cannot be written, another mlx-lqr writes it, or the disk is full.
    """
    if kind is not None and rank() > 0:
        with tempfile.TemporaryDirectory() as place:
            yield Path(place) / Path(target).name
        return
    target = followed(target)
    _check_replaceable(target, folder, kind, force)
    with ExitStack() as stack:
        alone = folder or kind is not None
        if alone:
            stack.enter_context(locked(target, patience=0 if folder else _PATIENCE))
            _remove_left(target.parent)
            _check_replaceable(target, folder, kind, force)
        yield from _written(_place_beside(target, _OURS if alone else ""), target, folder)


def _written(holder: Path, target: Path, folder: bool) -> Iterator[Path]:
    """Yield a path in `holder`, and move it to `target` afterwards."""
    _in_use.add(os.path.abspath(holder))
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
        _in_use.discard(os.path.abspath(holder))


def _exchange(new: Path, target: Path, old: Path) -> None:
    """Move the folder `target` to `old` and `new` to `target`. If that fails, `target` is moved back."""
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise


@contextmanager
def reserved(target: str | os.PathLike[str], kind: Kind, *, force: bool = False) -> Iterator[None]:
    """Around long work that ends with writing `target`: that it can be written is known before, and nobody else does.

    Raises:
        InputError: see `writing`.
    """
    check_writable(target, kind, force=force)
    with locked(target):
        yield


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
            if head.startswith(b"GGUF"):
                return "control vector" if b"controlvector" in head else None
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
    "control vector": "a control vector",
    "Jacobians": "a file of Jacobians",
    "transcript": "a transcript",
    "results": "a file of results",
    "PNG image": "a PNG image",
    "SVG image": "an SVG image",
}


_PATIENCE = 10.0
"""Seconds to wait for another one who writes the same file, which takes a moment"""
_OURS = "mlx-lqr-"
_LEFT = re.compile(r"\.(.+)\.mlx-lqr-[a-z0-9_]{8}", re.DOTALL)
"""A folder in which something is written under its target's lock"""
_in_use: set[str] = set()
"""Those of this process"""


def _remove_left(place: Path) -> None:
    """Remove what killed processes left in `place`. A living one has the lock of its target."""
    with suppress(OSError):
        for entry in list(os.scandir(place)):
            name = _LEFT.fullmatch(entry.name)
            if name is None or not entry.is_dir(follow_symlinks=False) or os.path.islink(place / name[1]):
                continue
            with suppress(InputError), locked(place / name[1]):
                if os.path.abspath(entry.path) not in _in_use:
                    shutil.rmtree(entry.path, ignore_errors=True)


def _place_beside(target: Path, mark: str = "") -> Path:
    """A new empty folder beside `target`, on the same file system."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{target.name}.{mark}", dir=target.parent))
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error


def _flush(path: Path) -> None:
    """Force the bytes of `path` to the disk, so that a full disk shows before the rename and not after it."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
