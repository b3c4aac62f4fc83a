"""Write the weights of an MLX model folder: safetensors shards, one tensor in memory at a time.

`mx.save_safetensors` needs a whole shard (5 GB) in memory and reports a full disk as a plain RuntimeError. Here each
tensor is written as it comes. The header of a safetensors file precedes the data but is only known when all tensors are
written, so room is left for it and filled up with spaces, which the format allows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlx_lqr.backends.protocol import Progress
from mlx_lqr.errors import InputError

SHARD_BYTES = 5 << 30  # as mlx-lm and the hub do
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)  # what MLX has kernels for

_CODES = {
    mx.float64: "F64",
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint64: "U64",
    mx.uint32: "U32",
    mx.uint16: "U16",
    mx.uint8: "U8",
    mx.int64: "I64",
    mx.int32: "I32",
    mx.int16: "I16",
    mx.int8: "I8",
    mx.bool_: "BOOL",
}
_ENTRY_ROOM = 256  # bytes; enough for a header entry without its name: dtype, up to six dimensions, two offsets


def write_weights(
    folder: Path, names: list[str], tensors: Iterable[tuple[str, mx.array]], progress: Progress | None = None
) -> None:
    """Write `tensors` as model.safetensors, or as numbered shards with an index if they do not fit into one.

    Args:
        folder: an existing folder.
        names: the names of `tensors`, in any order.
        tensors: (name, array); an array may be lazy, and is freed once it is written.
        progress: called as progress("Writing", done, total) after every tensor.

    Raises:
        InputError: a tensor has a NaN or an infinity.
        OSError: the disk is full.
    """
    room = sum(len(json.dumps(name)) + _ENTRY_ROOM for name in names)
    shards: list[_Shard] = []
    for done, (name, array) in enumerate(tensors, start=1):
        if not shards or shards[-1].size + array.nbytes > SHARD_BYTES:
            if shards:
                shards[-1].close()
            shards.append(_Shard(folder / f"shard-{len(shards)}", room))
        shards[-1].add(name, array)
        if progress is not None:
            progress("Writing", done, len(names))
    shards[-1].close()
    if len(shards) == 1:
        shards[0].path.rename(folder / "model.safetensors")
        return
    location: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        shard.path.rename(folder / file)
        location |= dict.fromkeys(shard.entries, file)
    total = sum(shard.size for shard in shards)
    index_file = {"metadata": {"total_size": total}, "weight_map": dict(sorted(location.items()))}
    write_json(folder / "model.safetensors.index.json", index_file)


def cast(name: str, array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """`array` in `dtype` (None keeps its own), evaluated.

    Raises:
        InputError: it has a NaN or an infinity.
    """
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    result = array if dtype is None else array.astype(dtype)
    if not mx.all(mx.isfinite(result)).item():
        if mx.all(mx.isfinite(array)).item():
            raise InputError(f"{name} holds values too large for {_name(result.dtype)}: use bfloat16 or float32")
        raise InputError(f"{name} holds values that are not numbers: the model is damaged, download it again")
    return result


def group_for(columns: int, group_size: int) -> int | None:
    """The group size for rows of `columns` values: `group_size` if it divides them, or 32, or None (not quantised)."""
    return next((group for group in (group_size, 32) if columns % group == 0), None)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as a readable JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Shard:
    """One safetensors file being written; `size` counts its tensor bytes."""

    def __init__(self, path: Path, room: int) -> None:
        self.path = path
        self.size = 0
        self.entries: dict[str, dict[str, Any]] = {}
        self._room = -(-(room + _ENTRY_ROOM) // 8) * 8  # the format wants the data 8-byte aligned
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - stays open from tensor to tensor
        self._file.seek(8 + self._room)

    def add(self, name: str, array: mx.array) -> None:
        end = self.size + array.nbytes
        self.entries[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [self.size, end],
        }
        plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array  # NumPy has no bfloat16
        try:
            self._file.write(np.ascontiguousarray(plain).data)
        except OSError:
            self._file.close()
            raise
        self.size = end

    def close(self) -> None:
        header = json.dumps({"__metadata__": {"format": "mlx"}, **self.entries}).encode()
        with self._file as file:
            file.seek(0)
            file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
