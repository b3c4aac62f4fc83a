"""How large an mlx-lm module is, its weights packed or not."""

from __future__ import annotations

from math import prod

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lqr.backends.mlx.blocks import unpacked_shape


def sizes_of(module: nn.Module) -> tuple[int, int, str]:
    """How many numbers the weights stand for, how many bytes they take, and how they are packed ("" where none is)."""
    count, packings = 0, set()
    for part in module.modules():
        weights = {name: weight for name, weight in part.items() if isinstance(weight, mx.array)}
        packed = "scales" in weights and hasattr(part, "bits")
        for name, weight in weights.items():
            if packed and name in ("scales", "biases"):
                continue
            count += prod(unpacked_shape(part)) if packed and name == "weight" else weight.size
        if packed:
            mode = getattr(part, "mode", "affine")
            packings.add(f"{part.bits} bits" if mode == "affine" else mode)
    nbytes = sum(weight.nbytes for _, weight in tree_flatten(module.parameters()) if isinstance(weight, mx.array))
    return count, nbytes, ", ".join(sorted(packings))
