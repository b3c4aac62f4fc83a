"""Small random models of families that are on no list, and mlx-lm's own modules hooked by hand."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from helpers.tiny_tokenizers import NoEnd
from mlx_lqr.backends.mlx.measured_model import MeasuredModel

CONFIGS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "families.json").read_text("utf-8"))
SHARING = ("gemma4_text", "gemma4", "hunyuan", "gemma3n", "rwkv7")
"""Families whose blocks hand on more than the residual stream."""
LOOPS = ("nanbeige",)
"""Families that run a block more than once."""
EXACT = tuple(family for family in CONFIGS if family not in (*SHARING, *LOOPS))

Hook = Callable[[int, mx.array, mx.array], mx.array]
"""hook(k, z, output) -> output, for the input z (B, L, d) and the output of block k"""
Push = Callable[[int, mx.array], mx.array]
"""push(k, z) -> z"""


def module_of(family: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """mlx-lm's model, whose random weights, norms included, are large enough for every part to matter.

    Args:
        **changes: other values of its config.
    """
    config = CONFIGS[family] | changes
    architecture: Any = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(seed)
    module: nn.Module = architecture.Model(architecture.ModelArgs.from_dict(config))

    def draw(_: str, weight: Any) -> Any:
        if not isinstance(weight, mx.array) or not mx.issubdtype(weight.dtype, mx.floating):
            return weight
        if weight.ndim == 1:
            return weight + 0.2 * mx.random.normal(weight.shape)
        if not mx.any(weight).item():
            return mx.random.normal(weight.shape) * weight.shape[-1] ** -0.5
        return weight

    module.update(tree_map_with_path(draw, module.parameters()))
    module.eval()
    mx.eval(module.parameters())
    return module


@functools.cache
def model_of(family: str) -> MeasuredModel:
    return MeasuredModel(module_of(family), CONFIGS[family], f"tiny-{family}", NoEnd())  # type: ignore[arg-type]


@contextmanager
def by_hand(blocks: Sequence[nn.Module], hook: Hook | None = None, push: Push | None = None) -> Iterator[None]:
    """Inside this context the blocks, called with their state first, go through the hooks; nothing of ours is used."""
    kinds = [type(block) for block in blocks]

    def hooked(k: int, kind: type[nn.Module]) -> type[nn.Module]:
        def call(self: nn.Module, z: mx.array, *args: Any, **kwargs: Any) -> Any:
            z = z if push is None else push(k, z)
            output = kind.__call__(self, z, *args, **kwargs)
            if hook is None:
                return output
            if isinstance(output, mx.array):
                return hook(k, z, output)
            return (hook(k, z, output[0]), *output[1:])

        return type(kind.__name__, (kind,), {"__call__": call})

    try:
        for k, (block, kind) in enumerate(zip(blocks, kinds, strict=True)):
            object.__setattr__(block, "__class__", hooked(k, kind))
        yield
    finally:
        for block, kind in zip(blocks, kinds, strict=True):
            object.__setattr__(block, "__class__", kind)
