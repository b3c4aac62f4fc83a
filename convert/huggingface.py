"""A Hugging Face folder or hub id -> an MLX folder, through mlx-lm's own model classes.

mlx-lm renames and reshapes weights for each architecture (`sanitize`). The final weights come from its lazily loaded
model, so each is read from the disk only when it is written. No code of the checkpoint is run; nothing is unpickled.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_lqr.backends.checkpoint.config import explicit, model_config
from mlx_lqr.backends.checkpoint.model_folder import FAMILIES, stated_config
from mlx_lqr.backends.checkpoint.weight_files import Weights, weights_of
from mlx_lqr.backends.mlx.library import load_lazily, may_be_cast, quantised_by, settings_read
from mlx_lqr.backends.mlx.load import DTYPES, arguments_for, as_mlx_lm_reads, flattened
from mlx_lqr.backends.protocol import Progress
from mlx_lqr.errors import InputError, first_line, quoted
from mlx_lqr.files.json_text import read_json_object

from .write import cast, group_for, write_json, write_weights

_COPIED = [
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
]


def convert_folder(
    source: Path, out: Path, dtype: str | None, quantize: int | None, group_size: int, progress: Progress | None
) -> None:
    """Write the model in `source` into the existing folder `out`."""
    config = _checked_config(source)
    files = _weight_files(source)
    flat = flattened(config)
    given = flat
    if config["model_type"] in FAMILIES:
        meaning = model_config(config)
        given = config | arguments_for(source, meaning, files)
        flat = explicit(meaning) | flat | {"tie_word_embeddings": given["tie_word_embeddings"]}
        if scaling := flat.get("rope_scaling"):
            kind = scaling.get("rope_type", scaling.get("type"))
            flat["rope_scaling"] = scaling | {
                "type": kind,
                "rope_type": kind,
            }  # some mlx-lm models read the old name
    model, loaded = _load(source, given, files)
    config = flat
    if quantize is not None:
        if "quantization" in loaded:
            raise InputError(f"{source} is already quantised: leave out --quantize, or start from the original model")
        loaded["quantization"] = _quantize(model, quantize, group_size)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
        if "quantization" in loaded:
            config[key] = loaded["quantization"]
    if dtype is not None:
        config["torch_dtype"] = dtype
        config.pop("dtype", None)
    if "vision_tower" not in getattr(model, "model", {}):
        config.pop("vision_config", None)  # mlx-lm has dropped the weights
    write_json(out / "config.json", config)
    names = [name for name, _ in tree_flatten(model.parameters())]
    write_weights(out, names, _weights(model, None if dtype is None else DTYPES[dtype]), progress)
    _copy_tokenizer(source, out)


def _checked_config(source: Path) -> dict[str, Any]:
    """config.json of `source`, without what points to code."""
    config = stated_config(source)
    model_type = config["model_type"]
    # mlx-lm imports a module of this name
    if not re.fullmatch(r"[\w-]+", model_type) or not _is_known(config):
        raise InputError(
            f"{source} has the model_type {quoted(model_type)}, which mlx-lm does not know: use another model"
        )
    config.pop("auto_map", None)  # the code that it names is not copied
    config.pop("_name_or_path", None)
    named = ("attn_implementation", "experts_implementation")  # packages, or code of the hub
    return {key: value for key, value in config.items() if not key.lstrip("_").startswith(named)}


def _is_known(config: dict[str, Any]) -> bool:
    return settings_read(config) is not None


def _weight_files(source: Path) -> Weights:
    pickled = next((file.name for file in source.iterdir() if file.suffix in (".bin", ".pt", ".pth")), None)
    if pickled is not None and not any(source.glob("*.safetensors")):
        raise InputError(
            f"{source} only has pickled weights ({pickled}), which can run code when they are read: use safetensors"
        )
    return weights_of(source)


def _load(source: Path, config: dict[str, Any], files: Weights) -> tuple[nn.Module, dict[str, Any]]:
    try:
        with as_mlx_lm_reads(source, config, files) as view:
            return load_lazily(view)
    except InputError:
        raise
    except Exception as error:  # of any of mlx-lm's modules
        raise InputError(f"{source} does not fit its config.json ({first_line(error)}): download it again") from error


def _quantize(model: nn.Module, bits: int, group_size: int) -> dict[str, Any]:
    """Quantise `model` (lazily) and return the config's entry, which names the modules with other settings."""
    common: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    entry = dict(common)
    wanted = quantised_by(model)

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        choice = True if wanted is None else wanted(path, module)
        if isinstance(choice, dict) or not choice:
            if choice:
                entry[path] = choice
            return choice
        group = group_for(module.weight.shape[-1], group_size)
        if group != group_size:
            entry[path] = False if group is None else common | {"group_size": group}
            return bool(group) and entry[path]
        return True

    nn.quantize(model, group_size, bits, class_predicate=settings)
    return entry


def _weights(model: nn.Module, dtype: mx.Dtype | None) -> Iterator[tuple[str, mx.array]]:
    """Take the weights out of `model`, so that each is freed once it is written."""
    weights = dict(tree_flatten(model.parameters()))
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    for name in list(weights):
        yield name, cast(name, weights.pop(name), dtype if may_be_cast(model, name) else None)


def _copy_tokenizer(source: Path, out: Path) -> None:
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if (source / "tokenizer_config.json").is_file():
        config = read_json_object(source / "tokenizer_config.json")
        config.pop("auto_map", None)
        write_json(out / "tokenizer_config.json", config)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", out / "additional_chat_templates")
    if not (out / "tokenizer.json").exists():
        _build_tokenizer(source, out)


def _build_tokenizer(source: Path, out: Path) -> None:
    """tokenizer.json from older files (tokenizer.model, or vocab.json and merges.txt), by transformers."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(str(source), trust_remote_code=False).save_pretrained(str(out))
    except Exception as error:  # transformers can raise anything for a damaged file
        reason = first_line(error)
        raise InputError(f"{source} has no tokenizer.json and none can be built ({reason}): add one") from error
    if not (out / "tokenizer.json").exists():
        raise InputError(f"{source} has no tokenizer.json and none can be built: add one")
