"""An adapter merged into an mlx-lm module, or run beside packed weights, which stay packed.

Packed once more, a weight would lose most of the adapter to rounding; unpacked, it takes four to eight times the
memory. So a packed layer computes W x + up (down x): SmolLM2 in 4 bits takes 80 MB, with an adapter of rank 8 for all
layers 90 MB, and unpacked 422 MB. Embeddings, which have no such layer, and weights that the adapter has whole are
unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lqr.backends.checkpoint import adapter_mlx_lm
from mlx_lqr.backends.checkpoint.adapter import EMBEDDINGS, HEAD, Adapter, Change, canonical
from mlx_lqr.backends.mlx.adapter_names import by_own_names
from mlx_lqr.backends.mlx.blocks import dequantized, unpacked_shape
from mlx_lqr.errors import InputError

_PARTS = ("weight", "bias")
OF_MLX_LM = "of mlx-lm"
"""The name of an adapter that mlx-lm has loaded, since it keeps none"""


def merge(module: nn.Module, adapter: Adapter) -> None:
    """Change what a module of a family on the list computes; its weights keep their dtype.

    Raises:
        InputError: the adapter is another model's.
    """
    _merge(module, adapter, _weights(module), EMBEDDINGS)


def merge_by_own_names(module: nn.Module, adapter: Adapter) -> Adapter:
    """Change what a module of any family computes; its weights keep their dtype.

    Returns:
        The adapter by the names of the module's weights.

    Raises:
        InputError: the adapter is another model's, or the module has in another form what it changes.
    """
    places = _weights(module)
    adapter = by_own_names(module, adapter, places)
    tables = {name: leaf for name, (_, leaf, _) in places.items() if isinstance(leaf, _EMBEDDINGS)}
    embeddings = max(tables, key=lambda name: unpacked_shape(tables[name])[0], default=EMBEDDINGS)
    read_as_layers = {} if adapter.is_peft else {name: leaf for name, leaf in tables.items() if name != EMBEDDINGS}
    turned = {name: change.transposed if name in read_as_layers else change for name, change in adapter.changes.items()}
    _merge(module, replace(adapter, changes=turned), places, embeddings)
    return adapter


_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
Places = dict[str, tuple[str, nn.Module, str]]
"""Weights, by the names that adapters have for them: the path of a weight's layer, the layer, its name there"""


def _merge(module: nn.Module, adapter: Adapter, places: Places, embeddings: str) -> None:
    shapes = {name: unpacked_shape(leaf, part) for name, (_, leaf, part) in places.items()}
    tied = embeddings in places and not any(name.endswith(HEAD) for name in places)
    dtype = _dtype(places)
    for name, change in adapter.changes_for(shapes, tied=tied, embeddings=embeddings).items():
        path, leaf, part = places[name]
        packed = part == "weight" and "scales" in leaf
        if packed and change.replacement is None and not isinstance(leaf, nn.QuantizedEmbedding):
            _run_beside(name, leaf, change, dtype)
            continue
        if packed:
            leaf = _unpacked(name, leaf, dtype)
            module.update_modules(tree_unflatten([(path, leaf)]))
            places |= {canonical(f"{path}.{own}"): (path, leaf, own) for own in _PARTS if own in leaf}
        weight = leaf[part]
        leaf[part] = change.applied(weight.astype(mx.float32), mx.array).astype(weight.dtype)
        mx.eval(leaf[part])  # or all weights are held twice


def _dtype(places: Places) -> mx.Dtype:
    """That of the activations, which is that of the norms."""
    norms = (leaf.weight.dtype for _, leaf, part in places.values() if part == "weight" and leaf.weight.ndim == 1)
    return next(norms, mx.float32)


def adapter_in(module: nn.Module) -> Adapter | None:
    """The adapter with which mlx-lm has loaded a module itself, or None: the same as `read_adapter` gives."""
    changes: dict[str, Change] = {}
    for path, layer in module.named_modules():
        if "lora_a" in layer:
            parts = {
                name: np.array(layer[name].astype(mx.float32)) for name in ("lora_a", "lora_b", "m") if name in layer
            }
            rank = parts["lora_a"].shape[1]  # (columns, r), or (E, r, columns) for experts
            config = {
                "fine_tune_type": "dora" if "m" in parts else "lora",
                "lora_parameters": {"rank": rank, "scale": layer.scale},
            }
            weights = {f"{path}.{name}": values for name, values in parts.items()}
            changes |= adapter_mlx_lm.changes(OF_MLX_LM, config, weights)
    return Adapter(OF_MLX_LM, changes, base=None) if changes else None


def without_adapter(blocks: Sequence[nn.Module]) -> Iterator[tuple[str, Any]]:
    """The weights of blocks under the names that they have without an adapter, which itself is left out."""
    weights = tree_flatten(list(blocks))
    layers = {name.rpartition(".")[0] for name, _ in weights if name.endswith((".lora_a", ".up"))}
    for name, weight in weights:
        layer, _, part = name.rpartition(".")
        outer, _, inner = layer.rpartition(".")
        if outer in layers and inner in ("linear", "embedding"):  # in which mlx-lm's layers have what they adapt
            yield f"{outer}.{part}", weight
        elif layer not in layers or part not in ("lora_a", "lora_b", "m", "up", "down", "factor"):
            yield name, weight


def _weights(module: nn.Module) -> Places:
    """Every array that the module computes with; of packed weights, the weight alone."""
    return {
        canonical(f"{path}.{part}" if path else part): (path, layer, part)
        for path, layer in module.named_modules()
        for part, array in layer.items()
        if isinstance(array, mx.array) and not part.startswith("_")
        if not ("scales" in layer and part in ("scales", "biases"))
    }


def _unpacked(name: str, leaf: nn.Module, dtype: mx.Dtype) -> nn.Module:
    dense: nn.Module
    if isinstance(leaf, nn.QuantizedEmbedding):
        dense = nn.Embedding(1, 1)
    elif isinstance(leaf, nn.QuantizedLinear):
        dense = nn.Linear(1, 1, bias="bias" in leaf)
    else:
        raise InputError(f"the adapter has {name} whole, where this model is quantised: load the unquantised one")
    dense.weight = dequantized(leaf, leaf).astype(dtype)
    if "bias" in leaf:
        dense.bias = leaf.bias
    return dense


def _run_beside(name: str, leaf: nn.Module, change: Change, dtype: mx.Dtype) -> None:
    """Let a packed layer add what the change adds to its weight, in this dtype."""
    if not isinstance(leaf, nn.QuantizedLinear) and not hasattr(leaf, "num_experts"):
        raise InputError(f"the adapter changes {name}, which is packed in a way of its own: load the unquantised model")
    kind: Any = type(leaf)
    if change.magnitude is not None:
        added = replace(change, magnitude=None).applied(dequantized(leaf, leaf).astype(mx.float32), mx.array)
        leaf.factor = (mx.array(change.magnitude) / mx.linalg.norm(added, axis=-1)).astype(dtype)
    if isinstance(leaf, nn.QuantizedLinear):
        leaf.__class__ = _AdaptedLinear
    else:
        change = change.of_all_experts(leaf.num_experts)
        leaf.__class__ = _adapted_experts(kind)
    leaf.up, leaf.down = (mx.array(part).astype(dtype) for part in (change.up, change.down))
    mx.eval(leaf.parameters())


class _AdaptedLinear(nn.QuantizedLinear):
    """factor (W x + up (down x)) + bias, with W packed; `up` (rows, r), `down` (r, columns), `factor` (rows,) if any.

    `dequantized` gives factor (W + up down).
    """

    def __call__(self, x: mx.array) -> mx.array:
        y = super().__call__(x)
        if "factor" not in self:
            return y + (x @ self.down.T) @ self.up.T
        bias = self.bias if "bias" in self else 0
        return self.factor * (y - bias + (x @ self.down.T) @ self.up.T) + bias


@cache
def _adapted_experts(kind: Any) -> type[nn.Module]:
    """The same for packed experts, with an `up` and a `down` for each."""

    class AdaptedExperts(kind):
        def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
            y = super().__call__(x, indices, sorted_indices=sorted_indices)
            for part in (self.down, self.up):
                x = mx.gather_mm(x, part.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices)
            return y + x

    return AdaptedExperts
