"""A hook on the blocks of an mlx-lm module: the one mechanism for recording, linearising and steering.

Every block's class is exchanged for a subclass of itself whose call passes through the hook, and put back afterwards.
The module tree, its parameters and attributes are untouched, so this works for every family, inside the model's own
forward pass with its own masks and scalings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class BlockCall:
    """One call of a block as the model made it, mask and cache included; a function of its input z (B, L, d)."""

    block: Callable[..., mx.array]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, z: mx.array) -> mx.array:
        return self.block(z, *self.args, **self.kwargs)

    def with_cache(self, old: Any, new: Any) -> BlockCall:
        """The same call with another cache."""
        args = tuple(new if value is old else value for value in self.args)
        kwargs = {name: new if value is old else value for name, value in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs)


Hook = Callable[[int, mx.array, BlockCall], mx.array]
"""hook(k, z, call) -> output: stands in for block k, whose own output is call(z)."""


@contextmanager
def hooked(blocks: list[nn.Module], hook: Hook, layers: Iterable[int]) -> Iterator[None]:
    """Inside this context every call of the blocks at `layers` goes through `hook`."""
    original = [(blocks[k], type(blocks[k])) for k in layers]
    try:
        for k, (block, kind) in zip(layers, original, strict=True):
            object.__setattr__(block, "__class__", _hooked_class(kind, k, hook))
        yield
    finally:
        for block, kind in original:
            object.__setattr__(block, "__class__", kind)


def _hooked_class(kind: type[nn.Module], k: int, hook: Hook) -> type[nn.Module]:
    def call(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return hook(k, x, BlockCall(kind.__call__.__get__(self), args, kwargs))

    return type(kind.__name__, (kind,), {"__call__": call})


class PrefixCache:
    """A plain KV cache that evicts nothing; a sliding window is expressed in the mask instead."""

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is not None and self.values is not None:
            keys = mx.concatenate([self.keys, keys], axis=-2)
            values = mx.concatenate([self.values, values], axis=-2)
        self.keys, self.values, self.offset = keys, values, keys.shape[-2]
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        if window_size is None and not return_array:
            return None if N == 1 else "causal"
        query = mx.arange(self.offset, self.offset + N)[:, None]
        key = mx.arange(self.offset + N)[None]
        mask = query >= key
        return mask if window_size is None else mask & (query < key + window_size)

    def frozen(self) -> FrozenCache:
        """The cache as it stood before its last token."""
        assert self.keys is not None
        assert self.values is not None
        return FrozenCache(self.keys[..., :-1, :], self.values[..., :-1, :])


class FrozenCache:
    """Returns the frozen prefix followed by the new key and value, and stores nothing.

    It makes a block a pure function of the last position.
    """

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        self.keys, self.values, self.offset = keys, values, keys.shape[-2]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return (
            mx.concatenate([self.keys.astype(keys.dtype), keys], axis=-2),
            mx.concatenate([self.values.astype(values.dtype), values], axis=-2),
        )


@contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """The block with float32 weights, packed ones unpacked; as it was when the context ends.

    Products with packed weights cannot be batched by `mx.vmap`, and 16 bits are too few for derivatives.
    """
    from mlx.utils import tree_flatten, tree_map, tree_unflatten

    leaves = block.leaf_modules()
    parameters = block.parameters()
    unpacked = [
        (path, _unpack(leaf))
        for path, leaf in tree_flatten(leaves, is_leaf=nn.Module.is_module)
        if hasattr(leaf, "scales") and hasattr(leaf, "bits")
    ]
    try:
        if unpacked:
            block.update_modules(tree_unflatten(unpacked))
        block.update(
            tree_map(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a, block.parameters())
        )
        yield
    finally:
        if unpacked:
            block.update_modules(leaves)
        block.update(parameters)


def _unpack(leaf: nn.Module) -> nn.Linear:
    weight = mx.dequantize(
        leaf.weight,
        leaf.scales,
        getattr(leaf, "biases", None),
        group_size=leaf.group_size,
        bits=leaf.bits,
        mode=getattr(leaf, "mode", "affine"),
    )
    linear = nn.Linear(1, 1, bias="bias" in leaf)
    linear.weight = weight
    if "bias" in leaf:
        linear.bias = leaf.bias
    return linear
