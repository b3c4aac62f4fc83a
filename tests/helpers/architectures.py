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
from mlx.utils import tree_flatten, tree_map_with_path
from tokenizers import Tokenizer, models, pre_tokenizers

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


TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"


def folder_of(family: str, place: Path, *, bits: int | None = None, **changes: Any) -> Path:
    """The model of `module_of` as a folder, which reads and writes words w0 to w63.

    Args:
        bits: of packed weights.
        **changes: other values of its config.
    """
    module, config = module_of(family, **changes), CONFIGS[family] | changes
    if bits is not None:
        packed = {"group_size": 32, "bits": bits, "mode": "affine"}
        nn.quantize(module, 32, bits, class_predicate=lambda _, part: _is_wide(part))
        config = {**config, "quantization": packed}
    place.mkdir(exist_ok=True)
    weights = {name: weight for name, weight in tree_flatten(module.parameters()) if isinstance(weight, mx.array)}
    mx.save_safetensors(str(place / "model.safetensors"), weights, metadata={"format": "mlx"})
    (place / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(place / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return place


def _is_wide(part: nn.Module) -> bool:
    return hasattr(part, "to_quantized") and part.weight.shape[-1] % 32 == 0


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
