"""SOURCE -> MLX model folder: see what the source is, and write the folder whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from gguf.constants import GGMLQuantizationType

from mlx_lqr.backends.mlx.device import on_gpu
from mlx_lqr.backends.mlx.library import may_be_cast, quantised_by
from mlx_lqr.backends.mlx.load import DTYPES
from mlx_lqr.backends.protocol import Progress
from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import writing

from .architectures import architecture
from .gguf_config import model_config
from .gguf_file import FLOAT_TYPES, GGUFFile
from .gguf_parts import open_gguf
from .gguf_tokenizer import GGUFTokenizer
from .gguf_weights import GGUFWeights
from .hub import hub_folder
from .huggingface import convert_folder
from .sources import demo_model
from .write import BITS, GROUP_SIZES, cast, group_for, write_json, write_weights


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    quantize: int | None = None,
    group_size: int = 64,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the model `source` as an MLX folder that `mlx_lm.load` reads.

    Args:
        source: a .gguf file (any of them, if the model is in parts), a Hugging Face folder, a hub id (its safetensors
            and tokenizer files are downloaded), or "demo" for the demonstration model.
        out: the folder to write. It must not exist, or be empty; with `force` it may also hold a model, which is
            replaced.
        dtype: "float32", "float16" or "bfloat16". None keeps the checkpoint's own; a quantised GGUF becomes float32 if
            MLX computes on the CPU, which is slow in 16 bits, and bfloat16 otherwise.
        quantize: 4 or 8 bits per weight (MLX affine quantisation); None does not quantise.
        group_size: how many weights share a scale: 32, 64 or 128. Rows that it does not divide get groups of 32; rows
            that 32 does not divide are not quantised. The config names all such modules.
        force: replace a folder that holds a model.
        progress: called as progress("Writing", done, total) after every tensor.

    Returns:
        `out`.

    Raises:
        InputError: the source, `out` or an option cannot be used; nothing is written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: use {', '.join(DTYPES)}")
    if quantize is not None and quantize not in BITS:
        raise InputError(f"cannot quantise to {quantize!r} bits: use {' or '.join(map(str, BITS))}")
    if group_size not in GROUP_SIZES:
        raise InputError(f"cannot quantise in groups of {group_size!r}: use {', '.join(map(str, GROUP_SIZES))}")
    with writing(out, folder=True, force=force) as folder:
        path = demo_model(progress=progress) if source == "demo" else Path(source)
        if path.is_file():
            _convert_gguf(open_gguf(path), folder, dtype, quantize, group_size, progress)
        else:
            checkpoint = path if path.is_dir() else hub_folder(str(source))
            convert_folder(checkpoint, folder, dtype, quantize, group_size, progress)
    return Path(out)


def _convert_gguf(
    file: GGUFFile, folder: Path, dtype: str | None, quantize: int | None, group_size: int, progress: Progress | None
) -> None:
    row = architecture(file)
    config = model_config(file, row)
    tokenizer = GGUFTokenizer(file)
    if len(tokenizer.tokens) > config["vocab_size"]:
        raise InputError(
            f"{file.path} has {len(tokenizer.tokens)} tokens but {config['vocab_size']} embeddings: download it again"
        )
    chosen = dtype or _own_dtype(file)
    weights = GGUFWeights(file, row, config, chosen)
    ends = tokenizer.eos_token_ids
    identifiers: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    written = row.written(config) | identifiers | {"torch_dtype": chosen}
    names = list(weights.shapes)
    narrow = {name: DTYPES[chosen] if may_be_cast(weights.module, name) else mx.float32 for name in names}
    arrays: Iterator[tuple[str, mx.array]] = ((name, cast(name, array, narrow[name])) for name, array in weights)
    if quantize is not None:
        common = {"group_size": group_size, "bits": quantize, "mode": "affine"}
        matrices = _matrices(weights, common)
        names = [part for name in names for part in _parts(name, matrices)]
        arrays = _quantized(arrays, matrices)
        written["quantization"] = written["quantization_config"] = _quantization(matrices, common)
    write_json(folder / "config.json", written)
    write_json(
        folder / "generation_config.json", {key: value for key, value in identifiers.items() if value is not None}
    )
    tokenizer.save(folder, config["max_position_embeddings"])
    write_weights(folder, names, arrays, progress)


def _own_dtype(file: GGUFFile) -> str:
    """The dtype of an unquantised file's matrices (norms are always float32); otherwise what suits the device."""
    kinds = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if kinds <= FLOAT_TYPES.keys():
        narrow = kinds - {GGMLQuantizationType.F32}
        return FLOAT_TYPES[narrow.pop()] if len(narrow) == 1 else "bfloat16" if narrow else "float32"
    return "bfloat16" if on_gpu() else "float32"


def _matrices(weights: GGUFWeights, common: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """name -> how it is quantised (None: it is not) of every linear layer and embedding, stacked experts among them."""
    wanted = quantised_by(weights.module) or (lambda *_: True)
    modules = dict(weights.module.named_modules())
    matrices: dict[str, dict[str, Any] | None] = {}
    for name, shape in weights.shapes.items():
        path = name.removesuffix(".weight")
        if len(shape) < 2 or not hasattr(modules.get(path), "to_quantized"):
            continue
        choice = wanted(path, modules[path])
        settings = common | choice if isinstance(choice, dict) else common
        group = group_for(shape[-1], settings["group_size"]) if choice else None
        matrices[name] = settings | {"group_size": group} if group else None
    return matrices


def _parts(name: str, matrices: dict[str, dict[str, Any] | None]) -> list[str]:
    module = name.removesuffix(".weight")
    return [name, f"{module}.scales", f"{module}.biases"] if matrices.get(name) else [name]


def _quantized(
    arrays: Iterator[tuple[str, mx.array]], matrices: dict[str, dict[str, Any] | None]
) -> Iterator[tuple[str, mx.array]]:
    """The arrays, with each quantised matrix as the same three arrays that `mlx.nn.quantize` makes of it."""
    for name, array in arrays:
        if settings := matrices.get(name):
            yield from zip(_parts(name, matrices), mx.quantize(array, **settings), strict=True)
        else:
            yield name, array


def _quantization(matrices: dict[str, dict[str, Any] | None], common: dict[str, Any]) -> dict[str, Any]:
    """The config's entry, as mlx-lm writes it: the common settings, and the modules that differ."""
    different = {name.removesuffix(".weight"): settings or False for name, settings in matrices.items()}
    return common | {name: settings for name, settings in different.items() if settings != common}
