"""The library's own files: NumPy arrays written and read; what a file says it is comes before anything else."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np

from mlx_lqr.errors import InputError
from mlx_lqr.files.tensor_file import TensorFile, tensor_bytes


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write float32 tensors and metadata strings to `path` (use inside `atomic.writing`).

    The same ones give the same bytes.
    """
    path.write_bytes(tensor_bytes(tensors, metadata))


def read_tensors(
    path: str | PathLike[str], expected: str | tuple[str, ...], what: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors and the metadata of a file of the format `expected`, or of any of them.

    Raises:
        InputError: there is no such file, it is damaged, or it has another format. `what` names the expected one in the
            message.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file} is a folder: name a file" if file.is_dir() else f"there is no file {file}")
    try:
        opened = TensorFile.opened(file)
        stated = opened.metadata.get("format", "")
        known = (expected,) if isinstance(expected, str) else expected
        if stated not in known:
            family = known[0].rsplit(" ", 1)[0]
            if stated.startswith(family):
                reads = " and ".join(map(repr, known))
                raise InputError(f"{file} has the format {stated!r}, this version reads {reads}: make it again")
            holds = f", but {stated!r}" if stated.startswith("mlx-lqr") else ""
            raise InputError(f"{file} is not {what} of mlx-lqr{holds}")
        return opened.tensors(), dict(opened.metadata)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged or not a safetensors file: make it again ({error})") from error


def read_format(path: str | PathLike[str]) -> str:
    """The format stated in a file's metadata; "" if there is none, or if the file cannot be read (`read_tensors` says
    why)."""
    try:
        return TensorFile.opened(path).metadata.get("format", "")
    except (OSError, ValueError):
        return ""


def check_shape(name: str, tensor: np.ndarray, axes: str, sizes: Mapping[str, int]) -> None:
    """Raise `ValueError` unless the tensor's shape is the sizes of the letters in `axes`, such as "Tdm"."""
    shape = tuple(sizes[axis] for axis in axes)
    if tensor.shape != shape:
        raise ValueError(f"{name} has the shape {tensor.shape}, expected {shape}")


def check_finite(name: str, tensor: np.ndarray) -> None:
    """Raise `ValueError` unless all values of a tensor are finite."""
    if not np.all(np.isfinite(tensor)):
        raise ValueError(f"{name} has values that are not finite")
