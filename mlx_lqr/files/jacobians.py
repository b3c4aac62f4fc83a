"""Jacobians on disk: one safetensors file, written layer by layer and read one layer at a time.

Layers are appended as they are computed, from the last to the first, to a hidden file beside the target. The header is
known beforehand, so the file's length says how many layers are finished. An interrupted run continues where it stopped
if its header is the same to the byte, and starts again otherwise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from safetensors import SafetensorError, safe_open

from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import check_writable, followed
from mlx_lqr.launched import refuse_several

_CODES = {"float32": "F32", "float16": "F16"}


class JacobianWriter:
    """Writes a file of T Jacobians (n, n).

    Args:
        path: the finished file.
        T, n: number of layers and size of the state.
        dtype: "float32" or "float16" (half the size; relative rounding 5e-4 an entry).
        metadata: strings that identify the run. The unfinished file of another run is overwritten.
        force: overwrite a file of any kind.

    Raises:
        InputError: an unknown dtype, or a file that cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        T: int,
        n: int,
        dtype: str,
        metadata: Mapping[str, str],
        *,
        force: bool = False,
    ) -> None:
        if dtype not in _CODES:
            raise InputError(f"Jacobians are stored as {' or '.join(_CODES)}, not {dtype!r}")
        refuse_several("Jacobians are stored")
        check_writable(path, "Jacobians", force=force)
        self._target = followed(path)
        self._partial = self._target.with_name(f".{self._target.name}.partial")
        self._dtype = np.dtype(dtype)
        self._layers = T
        self._size = n * n * self._dtype.itemsize
        header = _header(T, n, _CODES[dtype], self._size, metadata)
        try:
            self._file = open(self._partial, "r+b" if self._partial.exists() else "w+b")  # noqa: SIM115 - kept open
            if self._file.read(len(header)) != header:
                self._file.seek(0)
                self._file.truncate()
                self._file.write(header)
                self._file.flush()
            self.finished = min(T, (os.fstat(self._file.fileno()).st_size - len(header)) // self._size)
            self._file.truncate(len(header) + self.finished * self._size)
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise InputError(f"cannot write {self._target}: {error.strerror or error}") from error

    def append(self, jacobian: np.ndarray) -> None:
        """Write the next layer's Jacobian, counting down from T - 1, to the disk."""
        try:
            self._file.write(np.ascontiguousarray(jacobian, self._dtype).tobytes())
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"cannot write {self._target}: {error.strerror or error}; "
                f"the {self.finished} layers finished so far are kept"
            ) from error
        self.finished += 1

    def close(self) -> None:
        """Give the file its name, if it is complete."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            if self.finished == self._layers:
                os.replace(self._partial, self._target)
        except OSError as error:
            raise InputError(f"cannot write {self._target}: {error.strerror or error}") from error


def _header(T: int, n: int, code: str, size: int, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    for place, k in enumerate(reversed(range(T))):
        entries[f"jacobian.{k}"] = {"dtype": code, "shape": [n, n], "data_offsets": [place * size, (place + 1) * size]}
    text = json.dumps(entries, sort_keys=True).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the format wants the data aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text


class StoredJacobians(Sequence[np.ndarray]):
    """The Jacobians in a file, each read when it is used (the file is memory-mapped), in float32.

    Raises:
        InputError: there is no such file, or it does not hold one square Jacobian for every layer.
    """

    def __init__(self, path: str | os.PathLike[str], expected_format: str) -> None:
        file = Path(path)
        if not file.is_file():
            raise InputError(f"there is no file {file}")
        try:
            opened: Any = safe_open(file, framework="numpy")
            self._file = opened
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
            names = set(self._file.keys())
            slices = [self._file.get_slice(name) for name in names]
            shapes = {tuple(one.get_shape()) for one in slices}
            dtypes = {one.get_dtype() for one in slices}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is damaged or not a safetensors file: make it again ({error})") from error
        if self.metadata.get("format") != expected_format:
            raise InputError(f"{file} is not a file of Jacobians of this version of mlx-lqr: make it with `linearize`")
        self._count = len(names)
        square = len(shapes) == 1 and len(set(next(iter(shapes)))) == 1 and len(next(iter(shapes))) == 2
        if (
            not square
            or (0, 0) in shapes
            or not dtypes <= set(_CODES.values())
            or names != {f"jacobian.{k}" for k in range(self._count)}
        ):
            raise InputError(
                f"{file} does not hold one square Jacobian for every layer: make it again with `linearize`"
            )

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, layer: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, layer: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, layer: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(layer, slice):
            return [self[k] for k in range(*layer.indices(self._count))]
        k = range(self._count)[layer]
        return self._file.get_tensor(f"jacobian.{k}").astype(np.float32, copy=False)
