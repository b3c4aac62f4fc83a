"""The library's safetensors files: NumPy arrays written and read; the format is checked before anything else."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mlx_lqr.errors import InputError


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write float32 tensors and metadata strings to `path` (use inside `atomic.writing`)."""
    contiguous = {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}
    path.write_bytes(save(contiguous, metadata=dict(metadata)))


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
        with safe_open(file, framework="numpy") as opened:
            metadata = dict(opened.metadata() or {})
            stated = metadata.get("format", "")
            known = (expected,) if isinstance(expected, str) else expected
            if stated not in known:
                family = known[0].rsplit(" ", 1)[0]
                if stated.startswith(family):
                    reads = " and ".join(map(repr, known))
                    raise InputError(f"{file} has the format {stated!r}, this version reads {reads}: make it again")
                holds = f", but {stated!r}" if stated.startswith("mlx-lqr") else ""
                raise InputError(f"{file} is not {what} of mlx-lqr{holds}")
            return {name: read_tensor(opened, name) for name in opened.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged or not a safetensors file: make it again ({error})") from error


def read_tensor(opened: Any, name: str) -> np.ndarray:
    """A tensor of an open file.

    Raises:
        ValueError: of a dtype that this library does not write.
    """
    dtype = opened.get_slice(name).get_dtype()
    if dtype not in ("F16", "F32"):
        raise ValueError(f"{name} is of {dtype}, which it never is")
    tensor: np.ndarray = opened.get_tensor(name)
    return tensor


def read_format(path: str | PathLike[str]) -> str:
    """The format stated in a file's metadata; "" if there is none, or if the file cannot be read (`read_tensors` says
    why)."""
    try:
        with safe_open(path, framework="numpy") as opened:
            return (opened.metadata() or {}).get("format", "")
    except (SafetensorError, OSError, ValueError):
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
