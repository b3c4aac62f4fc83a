"""The norms of a GGUF file's blocks, by which a model is told from others, read without any of its other weights.

A model has the same fingerprint whatever runs it, so the norms are those of MLX's modules, under MLX's names. llama.cpp
stores some as what is multiplied by, where the model's own norm multiplies by 1 + weight.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lqr.backends.llama.library import GGUFParameters, ggml
from mlx_lqr.errors import InputError

_BLOCK: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
_SANDWICH: Mapping[str, str] = {
    **_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Norms:
    """How llama.cpp stores the norms of an architecture's blocks.

    `names` has MLX's name by that of the tensor; what a file has not is none of the model's. `whole`: see above.
    """

    names: Mapping[str, str]
    whole: bool = False


ARCHITECTURES: Mapping[str, Norms] = {
    **dict.fromkeys(("llama", "qwen2", "qwen2vl", "qwen3", "qwen3vl", "qwen3moe", "qwen3vlmoe"), Norms(_BLOCK)),
    **dict.fromkeys(("phi3", "smollm3"), Norms(_BLOCK)),
    "olmo2": Norms(_SANDWICH),
    "gemma": Norms(_BLOCK, whole=True),
    **dict.fromkeys(("gemma2", "gemma3"), Norms(_SANDWICH, whole=True)),
}
"""Those that are run and steered, by `general.architecture`"""

_STRING = 8
"""GGUF_TYPE_STRING"""
_F32, _F16, _BF16 = 0, 1, 30
_KINDS: Mapping[int, np.dtype[Any]] = {_F32: np.dtype("<f4"), _F16: np.dtype("<f2"), _BF16: np.dtype("<u2")}


def norms(files: Sequence[Path], architecture: str, layers: int) -> Iterator[tuple[str, bytes]]:
    """The norm weights of all blocks in bfloat16, by "LAYER.path.to.weight", as `fingerprint_of` takes them.

    Args:
        files: the parts of the model.

    Raises:
        InputError: a file cannot be read, or holds none.
    """
    known = ARCHITECTURES[architecture]
    wanted = {
        f"blk.{k}.{name}.weight": f"{k}.{ours}.weight" for k in range(layers) for name, ours in known.names.items()
    }
    found = 0
    for file in files:
        for name, weight in _read(file, list(wanted)):
            found += 1
            yield wanted[name], in_bfloat16(weight - 1 if known.whole else weight)
    if not found:
        raise InputError(f"{files[0]} holds no norms of blocks, so it is not a whole model: download it again")


def in_bfloat16(weight: np.ndarray) -> bytes:
    """Numbers in float32, rounded to the nearest in bfloat16, of two as near to the even one."""
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def architecture_of(file: Path) -> str | None:
    """What a file says of its architecture; None where it does not, or is no GGUF file."""
    library = ggml()
    opened = library.gguf_init_from_file(os.fsencode(file), GGUFParameters(no_alloc=True, ctx=None))
    if not opened:
        return None
    try:
        key = library.gguf_find_key(opened, b"general.architecture")
        if key < 0 or library.gguf_get_kv_type(opened, key) != _STRING:
            return None
        return str(library.gguf_get_val_str(opened, key), "utf-8", "replace")
    finally:
        library.gguf_free(opened)


def _read(file: Path, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Those of the named tensors that a file holds: (n,) in float32."""
    library = ggml()
    opened = library.gguf_init_from_file(os.fsencode(file), GGUFParameters(no_alloc=True, ctx=None))
    if not opened:
        raise InputError(f"llama.cpp cannot read {file}: download it again")
    try:
        start = library.gguf_get_data_offset(opened)
        places = []
        for name in names:
            number = library.gguf_find_tensor(opened, name.encode())
            if number >= 0:
                kind, size = library.gguf_get_tensor_type(opened, number), library.gguf_get_tensor_size(opened, number)
                places.append((name, start + library.gguf_get_tensor_offset(opened, number), kind, size))
    finally:
        library.gguf_free(opened)
    with open(file, "rb") as handle:
        for name, offset, kind, size in places:
            if kind not in _KINDS:
                raise InputError(f"{file} stores {name} quantised, as no norm is: convert the original model again")
            handle.seek(offset)
            stored = np.frombuffer(handle.read(size), _KINDS[kind])
            if kind == _BF16:
                stored = (stored.astype(np.uint32) << 16).view(np.float32)
            yield name, stored.astype(np.float32)
