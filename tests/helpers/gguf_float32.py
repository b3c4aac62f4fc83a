"""A GGUF file's model in float32, under the same header: what its blocks dequantise to, by the gguf package."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from helpers.real_models import reading_at_once

_ALIGNMENT = 32


def in_float32(source: Path, target: Path) -> Path:
    """Write the model of `source` to `target`."""
    with reading_at_once():
        reader = GGUFReader(source)
        keys = bytearray(source.read_bytes()[24 : reader.tensors[0].field.offset])
        field = reader.fields["general.file_type"]
        place = field.offset + sum(part.nbytes for part in field.parts[:-1]) - 24
        assert struct.unpack_from("<I", keys, place)[0] == field.parts[-1][0]
        struct.pack_into("<I", keys, place, 0)  # LLAMA_FTYPE_ALL_F32
        tensors = [
            (tensor.name, np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32))
            for tensor in reader.tensors
        ]
    infos, offset = b"", 0
    for name, values in tensors:
        shape = values.shape[::-1]
        infos += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", Kind.F32, offset)
        offset += -(-values.nbytes // _ALIGNMENT) * _ALIGNMENT
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), struct.unpack_from("<Q", source.read_bytes(), 16)[0])
    start = len(header) + len(keys) + len(infos)
    with open(target, "wb") as file:
        file.write(header + bytes(keys) + infos + bytes(-start % _ALIGNMENT))
        for _, values in tensors:
            file.write(values.tobytes() + bytes(-values.nbytes % _ALIGNMENT))
    return target
