"""Jacobians on disk: one safetensors file, written layer by layer and read one layer at a time.

Layers are appended as they are computed, from the last to the first, to a hidden file beside the target, which has a
name for each set of settings. After each Jacobian stand the number of its layer and a checksum: what is half written,
or of another layer, is neither continued nor read. An interrupted run goes on from there if its settings are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import check_writable
from mlx_lqr.files.locks import followed
from mlx_lqr.launched import refuse_several

FORMAT = "mlx-lqr jacobians 2"
UNNUMBERED = "mlx-lqr jacobians 1"
"""Without numbers of layers and checksums. Such files are still read."""

_CODES = {"float32": "F32", "float16": "F16"}
_STAMP = np.dtype("<i8")
"""Of a layer's number and its checksum"""


class JacobianWriter:
    """Writes a file of T Jacobians (n, n). Its user has the lock of the file (`locks.locked`).

    Args:
        path: the finished file.
        T, n: number of layers and size of the state.
        dtype: "float32" or "float16" (half the size; relative rounding 5e-4 an entry).
        metadata: strings that identify the run.
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
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._layers = T
        self._size = n * n * self._dtype.itemsize + 2 * _STAMP.itemsize
        header = _header(T, n, _CODES[dtype], self._size, {"format": FORMAT, **metadata})
        settings = hashlib.sha256(header).hexdigest()[:12]
        self._partial = self._target.with_name(f".{self._target.name}.{settings}.partial")
        try:
            self._file = _opened(self._partial)
            if self._file.read(len(header)) != header:
                self._file.seek(0)
                self._file.truncate()
                self._file.write(header)
                self._file.flush()
            self.finished = self._whole(len(header))
            self._file.truncate(len(header) + self.finished * self._size)
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise InputError(f"cannot write {self._target}: {error.strerror or error}") from error

    def append(self, layer: int, jacobian: np.ndarray) -> None:
        """Write the Jacobian of the next layer, counting down from T - 1, to the disk.

        Raises:
            InputError: the file cannot be written.
            ValueError: another layer.
        """
        if layer != self._layers - 1 - self.finished:
            raise ValueError(f"layer {layer} does not come after the {self.finished} last layers of {self._layers}")
        content = np.ascontiguousarray(jacobian, self._dtype).tobytes()
        try:
            self._file.write(content + _stamp(layer, content))
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"cannot write {self._target}: {error.strerror or error}; "
                f"the {self.finished} layers finished so far are kept"
            ) from error
        self.finished += 1

    def close(self) -> None:
        """Give the file its name, if it is complete, and remove unfinished ones of other settings."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            if self.finished < self._layers:
                return
            os.replace(self._partial, self._target)
        except OSError as error:
            raise InputError(f"cannot write {self._target}: {error.strerror or error}") from error
        unfinished = re.compile(re.escape(f".{self._target.name}.") + r"[0-9a-f]{12}\.partial")
        with suppress(OSError):
            for left in self._target.parent.iterdir():
                if unfinished.fullmatch(left.name):
                    left.unlink()

    def _whole(self, start: int) -> int:
        """How many layers stand in the file, each with its own number after it."""
        for place in range(self._layers):
            self._file.seek(start + (place + 1) * self._size - 2 * _STAMP.itemsize)
            stamp = self._file.read(2 * _STAMP.itemsize)
            if len(stamp) < 2 * _STAMP.itemsize or np.frombuffer(stamp, _STAMP)[0] != self._layers - 1 - place:
                return place
        return self._layers


def _opened(partial: Path) -> BinaryIO:
    """Open or create a file to continue it, if it is one: no link is followed, and nothing else is written to."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    if partial.is_symlink():
        raise InputError(f"{partial} is a link, which is not followed: remove it")
    descriptor = os.open(partial, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
        os.close(descriptor)
        raise InputError(f"{partial} is no file of its own: remove it")
    return os.fdopen(descriptor, "r+b")


def _stamp(layer: int, content: bytes) -> bytes:
    return np.array([layer, zlib.crc32(content)], _STAMP).tobytes()


def _header(T: int, n: int, code: str, size: int, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    for place, k in enumerate(reversed(range(T))):
        start, end = place * size, (place + 1) * size
        middle = end - 2 * _STAMP.itemsize
        entries[f"jacobian.{k}"] = {"dtype": code, "shape": [n, n], "data_offsets": [start, middle]}
        entries[f"layer.{k}"] = {"dtype": "I64", "shape": [2], "data_offsets": [middle, end]}
    text = json.dumps(entries, sort_keys=True).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the format wants the data aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text


class StoredJacobians(Sequence[np.ndarray]):
    """The Jacobians in a file, each read when it is used (the file is memory-mapped), in float32.

    Raises:
        InputError: there is no such file, or it does not hold one square Jacobian for every layer.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from safetensors import SafetensorError, safe_open  # which running a controller does without

        self._path = Path(path)
        if not self._path.is_file():
            raise InputError(f"there is no file {path}")
        try:
            opened: Any = safe_open(path, framework="numpy")
            self._file = opened
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
            names = set(self._file.keys())
            slices = {name: self._file.get_slice(name) for name in names}
            kinds = {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged or not a safetensors file: make it again ({error})") from error
        if self.metadata.get("format") not in (FORMAT, UNNUMBERED):
            raise InputError(f"{path} is not a file of Jacobians of this version of mlx-lqr: make it with `linearize`")
        self._numbered = self.metadata["format"] == FORMAT
        self._count = sum(name.startswith("jacobian.") for name in names)
        stamps = {f"layer.{k}" for k in range(self._count)} if self._numbered else set()
        shapes = {kinds[name][0] for name in names - stamps}
        dtypes = {kinds[name][1] for name in names - stamps}
        square = len(shapes) == 1 and len(set(next(iter(shapes)))) == 1 and len(next(iter(shapes))) == 2
        if (
            not square
            or (0, 0) in shapes
            or not dtypes <= set(_CODES.values())
            or names != {f"jacobian.{k}" for k in range(self._count)} | stamps
            or any(kinds[name] != ((2,), "I64") for name in stamps)
            or any(self._file.get_tensor(f"layer.{k}")[0] != k for k in range(self._count) if self._numbered)
        ):
            raise InputError(
                f"{path} does not hold one square Jacobian for every layer: make it again with `linearize`"
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
        jacobian = self._file.get_tensor(f"jacobian.{k}")
        if self._numbered and self._file.get_tensor(f"layer.{k}")[1] != zlib.crc32(np.ascontiguousarray(jacobian).data):
            raise InputError(f"{self._path} is damaged at layer {k}: make it again with `linearize`")
        return jacobian.astype(np.float32, copy=False)
