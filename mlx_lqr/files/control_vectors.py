"""Control vectors as llama.cpp and repeng keep them: a small GGUF file with a vector for each layer.

The file has the architecture "controlvector" and a float32 tensor `direction.N` (d,) for some layers N from 1 on, which
is added to the output of block N, the blocks counted from 0: there is no place for one at block 0. What the file says
of the model, `controlvector.model_hint` and `controlvector.layer_count`, no program but this one holds it to. Programs
take the count to be that of the layers, or of the vectors, so that it is no more than a number that a model's layers
must not fall short of.

Three entries are this library's own, and other programs pass them over: the concept (`general.name`), what the vectors
are (`general.description`), and the model's fingerprint (`mlx_lqr.fingerprint`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_lqr.errors import InputError, quoted
from mlx_lqr.files.json_text import LAYERS, WIDTH

ARCHITECTURE = "controlvector"
MAGIC = b"GGUF"
FINGERPRINT = "mlx_lqr.fingerprint"
LARGEST = 1 << 26
"""Values of all layers up to the last one that has a vector; the largest models that there are have a tenth of it."""
_NAME = re.compile(r"direction\.(0|[1-9]\d{0,4})")


@dataclass(frozen=True, eq=False)
class ControlVectors:
    """What a file holds. Texts are empty where it does not say."""

    directions: Mapping[int, np.ndarray]
    """By layer, from 1 on: (d,) float32"""
    model_hint: str
    """What kind of model they are for: its architecture, or its name"""
    layer_count: int
    concept: str = ""
    description: str = ""
    fingerprint: str = ""


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of GGUF, of whatever kind; False where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_control_vectors(path: str | os.PathLike[str]) -> ControlVectors:
    """Read and check a file.

    Raises:
        InputError: it cannot be read, is damaged or of another kind, or has vectors of several widths, at layer 0, not
            of float32 or not finite.
    """
    from mlx_lqr.convert.gguf_file import GGUFFile

    file = GGUFFile(path)
    if (kind := file.value("general.architecture", str)) != ARCHITECTURE:
        raise InputError(
            f"{path} is a GGUF file of {quoted(kind)} and holds no control vector: a model is the argument MODEL"
        )
    count = file.value(f"{ARCHITECTURE}.layer_count", int, 0)
    if not 0 <= count <= LAYERS:
        raise _damaged(path, f"it states {count} layers")
    directions: dict[int, np.ndarray] = {}
    for name, tensor in file.tensors.items():
        matched = _NAME.fullmatch(name)
        if matched is None or not 1 <= (layer := int(matched[1])) < LAYERS:
            raise _damaged(path, f"it holds {quoted(name)}, where only direction.1, direction.2 and so on can be")
        if tensor.kind.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > WIDTH:
            raise _damaged(
                path, f"{name} is {tensor.kind.name} of the shape {tensor.shape}, not F32 of a model's width"
            )
        if max(layer + 1, count) * tensor.shape[0] > LARGEST:
            raise _damaged(path, f"no model has {max(layer + 1, count)} layers of width {tensor.shape[0]}")
        directions[layer] = file.read(name)
        if not np.all(np.isfinite(directions[layer])):
            raise _damaged(path, f"{name} has values that are not finite")
    if not directions:
        raise _damaged(path, "it holds no direction")
    if len({len(direction) for direction in directions.values()}) > 1:
        raise _damaged(path, "its directions have several widths")
    return ControlVectors(
        {layer: directions[layer].copy() for layer in sorted(directions)},
        model_hint=file.value(f"{ARCHITECTURE}.model_hint", str, ""),
        layer_count=count,
        concept=file.value("general.name", str, ""),
        description=file.value("general.description", str, ""),
        fingerprint=file.value(FINGERPRINT, str, ""),
    )


def write_control_vectors(path: Path, vectors: ControlVectors) -> None:
    """Write a new file, in place of whatever is there (see `files.atomic.writing`)."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", vectors.model_hint)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", vectors.layer_count)
    texts = {"general.name": vectors.concept, "general.description": vectors.description}
    for key, text in {**texts, FINGERPRINT: vectors.fingerprint}.items():
        if text:
            writer.add_string(key, text)
    for layer, direction in vectors.directions.items():
        writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(direction, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _damaged(path: str | os.PathLike[str], reason: str) -> InputError:
    return InputError(f"{path} cannot be used as a control vector ({reason}): make it again, or download it again")
