"""A model whose weights are spread over the processes of `mlx.launch`, read from its folder.

It is measured as it is spread, families of the list too: their fast Jacobians are made of whole weights. A controller
knows the model by the norm weights that it knows it by in one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_lqr.backends.checkpoint.adapter import Adapter
from mlx_lqr.backends.checkpoint.config import model_config
from mlx_lqr.backends.mlx.distributed import Spread, joined
from mlx_lqr.backends.mlx.library import is_measured
from mlx_lqr.backends.mlx.load import load_module
from mlx_lqr.backends.mlx.measured_model import MeasuredModel, load_measured
from mlx_lqr.backends.mlx.model import norms_of
from mlx_lqr.backends.text.tokenizer import Tokenizer
from mlx_lqr.errors import InputError


def load_spread(
    folder: Path, config: dict[str, Any], name: str, dtype: str | None, adapter: Adapter | None, *, pipeline: bool
) -> MeasuredModel:
    """This process's part of the model in a folder.

    Args:
        pipeline: whether processes are to have blocks each, where they could have a part of each weight.

    Raises:
        InputError: a folder that one process could not load either, a model that does not come apart, or an adapter.
    """
    if adapter is not None:
        raise InputError("adapters run on one machine alone: fuse this one into the model with mlx_lm.fuse")
    spread = joined(pipeline=pipeline)
    if is_measured(str(config["model_type"])):
        return load_measured(folder, config, name, dtype, spread=spread)
    return _listed(folder, config, name, dtype, spread)


def _listed(folder: Path, config: dict[str, Any], name: str, dtype: str | None, spread: Spread) -> MeasuredModel:
    def keep(module: nn.Module) -> None:
        spread.place(module, module.layers, norms_of)

    meaning = model_config(config)
    module = load_module(folder, config, meaning, dtype, keep=keep)
    model = MeasuredModel(module, config, name, Tokenizer(folder, config), spread=spread)
    model.context_length, model.rolls = meaning.context_length, meaning.rolls
    return model
