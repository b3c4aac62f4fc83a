"""An adapter merged into a transformers model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mlx_lqr.backends.checkpoint.adapter import EMBEDDINGS, HEAD, Adapter, canonical


def merge(module: Any, adapter: Adapter) -> None:
    """Change the module's weights, in float32 and back in their dtype.

    Raises:
        InputError: the adapter is another model's.
    """
    weights = _weights(module)
    tied = HEAD not in weights and EMBEDDINGS in weights
    for name, change in adapter.changes_for({name: tuple(w.shape) for name, w in weights.items()}, tied=tied).items():
        weight = weights[name]

        def array(values: NDArray[np.float32], device: torch.device = weight.device) -> torch.Tensor:
            return torch.tensor(values, device=device)

        weight.copy_(change.applied(weight.float(), array))


def _weights(module: Any) -> dict[str, torch.Tensor]:
    """Views of all weights by the names that adapters have for them; a weight that is shared is there once."""
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        place, _, part = canonical(name).rpartition(".")
        if part == "gate_up_proj":
            weights[f"{place}.gate_proj.weight"], weights[f"{place}.up_proj.weight"] = parameter.data.chunk(2, dim=1)
        elif part == "down_proj":
            weights[f"{place}.down_proj.weight"] = parameter.data
        else:
            weights[canonical(name)] = parameter.data
    return weights
