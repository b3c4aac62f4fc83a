"""Small random models of families that are on no list, and mlx-lm's own modules hooked by hand."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from helpers.survey import random_module, written
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
    return random_module(CONFIGS[family] | changes, seed)


@functools.cache
def model_of(family: str) -> MeasuredModel:
    return MeasuredModel(module_of(family), CONFIGS[family], f"tiny-{family}", NoEnd())  # type: ignore[arg-type]


def folder_of(family: str, place: Path, *, bits: int | None = None, **changes: Any) -> Path:
    """The model of `module_of` as a folder, which reads and writes words w0 to w63.

    Args:
        bits: of packed weights.
        **changes: other values of its config.
    """
    packed = None if bits is None else {"group_size": 32, "bits": bits, "mode": "affine"}
    return written(CONFIGS[family] | changes, place, packed=packed)


@contextmanager
def by_hand(
    blocks: Sequence[nn.Module], hook: Hook | None = None, push: Push | None = None, *, place: int | str = 0
) -> Iterator[None]:
    """Inside this context the blocks go through the hooks; nothing of ours is used.

    Args:
        place: where the state stands among a block's arguments, or its name.
    """
    kinds = [type(block) for block in blocks]

    def hooked(k: int, kind: type[nn.Module]) -> type[nn.Module]:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            z = given[place] if push is None else push(k, given[place])
            args = tuple(z if i == place else argument for i, argument in enumerate(args))
            output = kind.__call__(self, *args, **(kwargs | {place: z} if isinstance(place, str) else kwargs))
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
