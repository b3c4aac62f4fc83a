"""The safetensors format, with nothing but NumPy: so that a controller is read where no more is installed.

A file is the length of its header (8 bytes, little-endian), the header, and the tensors' bytes. The header is JSON:
{name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [first, last]}, ..., "__metadata__": {name: text}}. As the
format demands, the tensors cover all bytes after it, without gaps and without overlaps; what does not is refused.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lqr.files.json_text import parse_json

_METADATA = "__metadata__"
_LONGEST = 100_000_000
"""Bytes of a header, by the format"""
_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
"""Bytes of a number, by its dtype's name"""
_READ: Mapping[str, str] = {"F16": "<f2", "F32": "<f4"}
"""What this library's own files are made of"""


@dataclass(frozen=True)
class TensorFile:
    """A file whose header has been read and checked.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or of another format.
    """

    path: Path
    metadata: Mapping[str, str]
    places: Mapping[str, tuple[str, tuple[int, ...], int, int]]
    """By name: dtype, shape, the first byte in the file, and where the bytes end"""

    @classmethod
    def opened(cls, path: str | os.PathLike[str]) -> TensorFile:
        """The file at `path`."""
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = 8 + int.from_bytes(file.read(8), "little")
            if not 8 < start <= min(size, 8 + _LONGEST):
                raise ValueError("its header is longer than the file")
            header = _entries(file.read(start - 8))
        metadata = header.pop(_METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata is no table of texts")
        places = {name: _place(name, entry, start) for name, entry in header.items()}
        end = start
        for name, (_, _, first, last) in sorted(places.items(), key=lambda item: item[1][2:]):
            if first != end:
                raise ValueError(f"the bytes of {name} do not follow those before")
            end = last
        if end != size:
            raise ValueError("its tensors are not all of its bytes")
        return cls(Path(path), metadata, places)

    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors, in float16 or float32 as they are stored.

        Raises:
            ValueError: one is of another dtype.
        """
        with open(self.path, "rb") as file:
            return {name: self._read(file, name) for name in self.places}

    def _read(self, file: Any, name: str) -> np.ndarray:
        dtype, shape, first, last = self.places[name]
        if dtype not in _READ:
            raise ValueError(f"{name} is of {dtype}, which it never is")
        file.seek(first)
        content = file.read(last - first)
        if len(content) != last - first:
            raise ValueError("it has become shorter meanwhile")
        return np.frombuffer(content, _READ[dtype]).reshape(shape).copy()


def tensor_bytes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A file of these tensors, in float32; the same ones and the same metadata give the same bytes."""
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    parts, end = [], 0
    for name in sorted(tensors):
        parts.append(np.ascontiguousarray(tensors[name], "<f4"))
        first, end = end, end + parts[-1].nbytes
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [first, end]}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the format wants the data aligned to 8 bytes
    return b"".join([len(text).to_bytes(8, "little"), text, *(part.tobytes() for part in parts)])


def _entries(header: bytes) -> dict[str, Any]:
    if not header.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    entries = parse_json(header.decode("utf-8"))
    if not isinstance(entries, dict):
        raise ValueError("its header is no JSON object")
    return entries


def _place(name: str, entry: Any, start: int) -> tuple[str, tuple[int, ...], int, int]:
    """A tensor's dtype, shape, and first and last byte in a file whose tensors begin at `start`."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its entry for {name} is none of a tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise ValueError(f"{name} is of an unknown dtype")
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has no shape, or no place")
    first, last = offsets
    if last - first != math.prod(shape) * _SIZES[dtype]:
        raise ValueError(f"{name} has the shape {tuple(shape)}, and {last - first} bytes")
    return dtype, tuple(shape), start + first, start + last


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)
