"""Hooks on the blocks of an mlx-lm module, or on parts of them; a block with its past frozen, in float32.

Every block's class is exchanged for a subclass of itself whose call passes through the hook, and put back afterwards.
The module tree, its parameters and attributes are untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_lqr.backends.hooks import UNSTEERED, BlockCall, BlockHooks, Hook, LawHooks

TANGENTS = 576
"""Directions differentiated at once: enough for full speed, and little memory beside a wide model's matrices."""


class ClassHooks(BlockHooks):
    """Hooks by exchanging classes, which are made once."""

    library = "mlx_lm"

    def __init__(
        self, blocks: Sequence[nn.Module], hook: Hook, layers: Iterable[int], law: LawHooks = UNSTEERED
    ) -> None:
        super().__init__(blocks, hook, layers, law)
        self._classes: dict[tuple[int, type[nn.Module]], type[nn.Module]] = {}

    @staticmethod
    def _is_hooked(module: nn.Module) -> bool:
        return getattr(type(module), "is_hooked", False)

    def _call_of(self, module: nn.Module) -> type[nn.Module]:
        return type(module)

    def _place(self, k: int, module: nn.Module, hook: Hook) -> None:
        kind = type(module)
        if (k, kind) not in self._classes:
            mine = self._is_mine

            def call(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
                block = kind.__call__.__get__(self)
                return hook(k, x, BlockCall(block, args, kwargs)) if mine() else block(x, *args, **kwargs)

            self._classes[k, kind] = type(kind.__name__, (kind,), {"__call__": call, "is_hooked": True})
        object.__setattr__(module, "__class__", self._classes[k, kind])

    def _put_back(self, module: nn.Module, call: type[nn.Module]) -> None:
        object.__setattr__(module, "__class__", call)


def hooked(
    blocks: Sequence[nn.Module], hook: Hook, layers: Iterable[int], law: LawHooks = UNSTEERED
) -> AbstractContextManager[None]:
    """Inside this context every call of the blocks at `layers` goes through `hook` (see `BlockHooks`)."""
    return ClassHooks(blocks, hook, layers, law).placed()


class FrozenCache:
    """Returns the frozen prefix followed by the new key and value, and stores nothing.

    It makes a block a pure function of the one new position.
    """

    def __init__(
        self, keys: mx.array | None = None, values: mx.array | None = None, position: int | None = None
    ) -> None:
        self.keys: Any = keys
        self.values: Any = values
        self.length = 0 if keys is None else int(keys.shape[-2])
        self.offset = self.length if position is None else position
        """The new token's position, which a window that has moved on is not the length of."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is None or self.values is None:
            return keys, values
        return (
            mx.concatenate([self.keys.astype(keys.dtype), keys], axis=-2),
            mx.concatenate([self.values.astype(values.dtype), values], axis=-2),
        )

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """For the one new token, which sees everything but what has left the window."""
        if window_size is None and not return_array:
            return None
        seen = mx.arange(self.length + 1)[None]
        return seen >= 0 if window_size is None else seen > self.length - window_size


@contextmanager
def differentiable(block: nn.Module) -> Iterator[None]:
    """The block in float32, with every product in a form that can be differentiated and batched; afterwards as it was.

    Products with packed weights have no `mx.vmap`, gathered products of experts no derivative, and 16 bits are too few.
    For a single position only: experts are picked once.
    """
    leaves = block.leaf_modules()
    parameters = block.parameters()
    stand_ins = [
        (path, _PickedExperts(leaf) if hasattr(leaf, "num_experts") else _unpacked(leaf))
        for path, leaf in tree_flatten(leaves, is_leaf=nn.Module.is_module)
        if hasattr(leaf, "num_experts") or hasattr(leaf, "scales")
    ]
    if not stand_ins and all(weight.dtype == mx.float32 for _, weight in tree_flatten(parameters)):
        yield
        return
    try:
        if stand_ins:
            block.update_modules(tree_unflatten(stand_ins))
        block.update(
            tree_map(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a, block.parameters())
        )
        yield
    finally:
        if stand_ins:
            block.update_modules(leaves)
        block.update(parameters)


_PARTS = ("weight", "scales", "biases", "bias", "up", "down")
"""Of experts; the last two are an adapter's"""


class _PickedExperts(nn.Module):
    """The experts of a mixture that one position uses, applied one by one as dense float32 products."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self._experts = (experts,)  # in a tuple, so that it does not become part of the module tree

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        (experts,) = self._experts
        chosen = indices.reshape(-1)  # (k,), and x is (1, 1, 1 or k, 1, d)
        parts = {name: experts[name][chosen] for name in _PARTS if name in experts}
        weight = dequantized(experts, parts) if "scales" in parts else parts["weight"]
        weight = weight.astype(mx.float32)
        products = [x[..., min(j, x.shape[-3] - 1), :, :] @ weight[j].T for j in range(chosen.size)]
        result = mx.stack(products, axis=-3)
        return result + parts["bias"][:, None].astype(mx.float32) if "bias" in parts else result


def _unpacked(leaf: nn.Module) -> nn.Linear:
    linear = nn.Linear(1, 1, bias="bias" in leaf)
    linear.weight = dequantized(leaf, leaf)
    if "bias" in leaf:
        linear.bias = leaf.bias
    return linear


def dequantized(leaf: nn.Module, parts: Any) -> mx.array:
    """The weight that `parts` (weight, scales, biases) packs in the way of `leaf`, with what an adapter makes of it."""
    packing = {"group_size": leaf.group_size, "bits": leaf.bits, "mode": leaf.mode}
    weight = mx.dequantize(parts["weight"], parts["scales"], parts.get("biases"), **packing)
    if "up" in parts:
        weight = weight + parts["up"] @ parts["down"]
    return parts["factor"][:, None] * weight if "factor" in parts else weight


def unpacked_shape(layer: nn.Module, part: str = "weight") -> tuple[int, ...]:
    """The shape of a layer's weight or bias; of a packed weight, as it is unpacked."""
    if part != "weight" or "scales" not in layer:
        return tuple(layer[part].shape)
    return (*layer.weight.shape[:-1], layer.scales.shape[-1] * layer.group_size)
