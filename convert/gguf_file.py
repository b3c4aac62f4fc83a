"""Read a GGUF file: its metadata, and its tensors dequantised one at a time.

The file may be damaged or hostile, so every count and length in its header is checked against its size before anything
is allocated or looped over. The `gguf` package's own reader does not do that (an array that claims 2^60 elements keeps
it busy for ever) and takes seconds for a large vocabulary. Its block dequantisation is used as it is.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from mlx_lqr.errors import InputError

MAGIC = b"GGUF"

# value type -> (struct format, NumPy dtype) of the fixed-size metadata types
_SCALARS = {
    0: ("<B", "<u1"),
    1: ("<b", "<i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("<?", "?"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_DEQUANTIZED_AT_ONCE = 1 << 24  # values

# types that are stored as plain numbers, not as blocks of quantised values
FLOAT_TYPES = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is: in which part of the model, and where in it.

    `shape` is in NumPy's order (rows first), the reverse of GGUF's.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int
    part: int = 0


class GGUFFile:
    """An open GGUF file: `metadata` (key -> value), `tensors` (name -> `Tensor`) and `read`.

    Raises:
        InputError: the file cannot be read, is not GGUF, or is cut short or corrupt.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as handle:
                self._bytes = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            reason = error.strerror if isinstance(error, OSError) else "it is empty"
            raise InputError(f"cannot read {self.path}: {reason}") from error
        if self._bytes[:4] != MAGIC:
            raise InputError(f"{self.path} is not a GGUF file: give a .gguf file, a model folder or a hub id")
        self._parts = [self._bytes]
        self._position = 4
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        try:
            self._read_header()
        except UnicodeDecodeError as error:
            raise self._corrupt("its header holds text that is not UTF-8") from error

    def value(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The metadata value of `key`, of type `kind`, or `default` if the key is absent.

        Raises:
            InputError: it has another type, or the key is absent and there is no default.
        """
        value = self.metadata.get(key, default)
        if kind is float and type(value) in (int, float):
            # GGUF stores float32; its shortest decimal is the original config's number (1e-05, not 9.99...e-06)
            value = float(str(np.float32(value)))
        if value is None:
            raise InputError(f"{self.path} does not state {key}: convert the original model to GGUF again")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InputError(f"{self.path} states {key} as {str(value)[:40]!r}: convert the original model again")
        return value

    def read(self, name: str) -> NDArray[np.float32]:
        """The tensor `name`, dequantised."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self._parts[tensor.part], np.uint8, tensor.nbytes, tensor.offset)
        if tensor.kind == GGMLQuantizationType.F32:
            return raw.view("<f4").reshape(tensor.shape)
        rows = raw.reshape(prod(tensor.shape[:-1]), -1)
        values = np.empty((len(rows), tensor.shape[-1]), np.float32)
        step = max(1, _DEQUANTIZED_AT_ONCE // tensor.shape[-1])
        try:
            for start in range(0, len(rows), step):  # the gguf package needs three times the memory of its input
                part = slice(start, start + step)
                with np.errstate(all="ignore"):  # NaNs of a damaged file are refused when they are written
                    values[part] = dequantize(rows[part], tensor.kind)
        except NotImplementedError as error:
            raise InputError(
                f"{self.path} stores {name} as {tensor.kind.name}, which the gguf package cannot dequantise: "
                "use another quantisation of this model"
            ) from error
        return values.reshape(tensor.shape)

    def append(self, part: GGUFFile) -> None:
        """Take in the tensors of the next part of the model.

        Raises:
            InputError: one of them is here already.
        """
        for name, tensor in part.tensors.items():
            if name in self.tensors:
                raise InputError(f"{self.path} and {part.path} both hold {name[:80]!r}: download the model again")
            self.tensors[name] = replace(tensor, part=len(self._parts))
        self._parts.append(part._bytes)

    def strings(self, key: str) -> list[str]:
        """The list of strings under `key`."""
        values: list[str] = self.value(key, list)
        if values and not isinstance(values[0], str):  # an array's items are all of one type
            raise InputError(f"{self.path} states {key} as numbers: convert the original model again")
        return values

    def _read_header(self) -> None:
        version = self._scalar("<I")
        if version & 0xFFFF == 0:
            raise InputError(f"{self.path} is a big-endian GGUF file: use the little-endian one")
        if version not in (2, 3):
            raise InputError(
                f"{self.path} is GGUF version {version}, only 2 and 3 can be read: convert the model again"
            )
        tensor_count, key_count = self._scalar("<Q"), self._scalar("<Q")
        self._expect(key_count, 13)  # a key's length (8), its type (4) and at least one byte of value
        for _ in range(key_count):
            key = self._string()
            if key in self.metadata:
                raise self._corrupt(f"it states {key} twice")
            self.metadata[key] = self._value(self._scalar("<I"))
        entry = 8 + 4 + 4 + 8  # bytes of a name's length, the number of dimensions, the type and the offset
        self._expect(tensor_count, entry)
        table = [self._tensor_entry() for _ in range(tensor_count)]
        alignment = self.value("general.alignment", int, 32)
        if alignment < 1 or alignment & (alignment - 1):
            raise self._corrupt(f"its alignment is {alignment}")
        start = -(-self._position // alignment) * alignment
        for name, shape, kind, offset in table:
            self.tensors[name] = self._placed(name, shape, kind, start + offset)
        if len(self.tensors) != tensor_count:
            raise self._corrupt("it lists a tensor twice")

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._scalar("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._corrupt(f"tensor {name[:80]!r} has {dimensions} dimensions")
        shape = tuple(self._scalar("<Q") for _ in range(dimensions))[::-1]
        return name, shape, self._scalar("<I"), self._scalar("<Q")

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError:
            raise InputError(
                f"{self.path} stores {name[:80]!r} as GGML type {kind}, which the gguf package does not know: "
                "update it (pip install -U gguf) or use another quantisation of this model"
            ) from None
        block_size, block_bytes = GGML_QUANT_SIZES[quantization]
        if min(shape) < 1 or shape[-1] % block_size:
            raise self._corrupt(f"tensor {name[:80]!r} has the shape {shape}")
        nbytes = prod(shape) // block_size * block_bytes
        if offset + nbytes > len(self._bytes):
            raise self._truncated()
        return Tensor(name, shape, quantization, offset, nbytes)

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind][0])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._corrupt(f"its header holds a value of type {kind}")
        item, count = self._scalar("<I"), self._scalar("<Q")
        if item == _STRING:
            self._expect(count, 8)
            return [self._string() for _ in range(count)]
        if item not in _SCALARS:
            raise self._corrupt(f"its header holds an array of type {item}")
        dtype = np.dtype(_SCALARS[item][1])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()

    def _scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _string(self) -> str:
        return str(self._take(self._scalar("<Q")), "utf-8")

    def _take(self, count: int) -> bytes:
        start, self._position = self._position, self._position + count
        if self._position > len(self._bytes):
            raise self._truncated()
        return self._bytes[start : self._position]

    def _expect(self, count: int, size: int) -> None:
        """Refuse a count of items, each at least `size` bytes long, that the rest of the file cannot hold."""
        if count * size > len(self._bytes) - self._position:
            raise self._truncated()

    def _truncated(self) -> InputError:
        return InputError(f"{self.path} is cut short or corrupt: download it again")

    def _corrupt(self, what: str) -> InputError:
        return InputError(f"{self.path} is corrupt ({what}): download it again")
