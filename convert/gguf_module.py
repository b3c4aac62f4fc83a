"""mlx-lm's model of a converted config, without weights: it says which there are, and their shapes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lqr.backends.checkpoint.config import model_config
from mlx_lqr.backends.checkpoint.model_folder import FAMILIES
from mlx_lqr.backends.mlx.family import arguments
from mlx_lqr.backends.mlx.library import any_model_classes, model_classes, settings_read
from mlx_lqr.backends.mlx.load import flattened
from mlx_lqr.errors import InputError, first_line

from .architectures import Architecture
from .gguf_file import GGUFFile


def built(file: GGUFFile, row: Architecture, config: dict[str, Any]) -> nn.Module:
    """The model. Its arrays are never evaluated, so it takes no memory.

    Raises:
        InputError: mlx-lm has no such model, or cannot compute what the config says.
    """
    listed = row.model_type in FAMILIES
    try:
        if listed:
            meaning = model_config(config)
            Model, ModelArgs = model_classes(meaning.family)
            given = arguments(meaning)
        else:
            _check_rope(file, row, config)
            Model, ModelArgs = any_model_classes(row.model_type)
            given = flattened(row.written(config))
        module: nn.Module = Model(ModelArgs.from_dict(given))
    except Exception as error:  # of any of mlx-lm's modules
        if isinstance(error, InputError):
            raise InputError(f"{file.path} cannot be converted: {error}") from error
        if listed:
            reason = f"states sizes that no model has ({first_line(error)}): download it again"
        else:
            reason = f"is no model that mlx-lm's {row.model_type} can build ({first_line(error)}): use another model"
        raise InputError(f"{file.path} {reason}") from error
    return module


def _check_rope(file: GGUFFile, row: Architecture, config: dict[str, Any]) -> None:
    """Refuse a scaling of RoPE that the class would ignore."""
    read = settings_read(config)
    if config["rope_scaling"] is None or row.nested is not None or read is None:
        return
    if not read & {"rope_scaling", "rope_parameters"}:
        raise InputError(f"{file.path} scales RoPE, which mlx-lm's {row.model_type} does not do: use another model")


def parameters(module: nn.Module, row: Architecture, config: dict[str, Any]) -> dict[str, mx.array]:
    """Name -> array of every weight that is stored."""
    arrays: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    read = settings_read(config) or set()
    if config["tie_word_embeddings"] and (row.nested is not None or "tie_word_embeddings" in read):
        for name in ("lm_head.weight", "language_model.lm_head.weight"):  # some classes build a head all the same
            arrays.pop(name, None)
    return arrays
