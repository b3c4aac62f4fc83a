"""A measured block's Jacobian by its expansion to first order, where the block itself confirms it.

`expansion.py` knows attention and MLP by the names of their products alone. Attention that uses its input in another
way too, as for a gate on its output, is expanded wrongly and nothing in it says so. So u' A is compared with one
reverse pass through the whole block, for a random direction u: what differs is not used.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lqr.backends.mlx.blocks import FrozenCache, differentiable
from mlx_lqr.backends.mlx.copying import copied
from mlx_lqr.backends.mlx.expansion import block_jacobian
from mlx_lqr.backends.mlx.frozen import FrozenBlock
from mlx_lqr.backends.mlx.library import can_roll, in_order
from mlx_lqr.backends.protocol import Float32
from mlx_lqr.backends.state_place import state_in

TOLERANCE = 1e-3
"""Relative, of u' A."""
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def confirmed_jacobian(frozen: FrozenBlock, z: Float32) -> Float32 | None:
    """A at z (d,): (d, d); None where the block has no parts that are expanded, or does not confirm what comes out."""
    block, layout = frozen.block, frozen.layout
    if frozen.differences or any(name not in (block.get("self_attn") or {}) for name in _PROJECTIONS):
        return None
    direction = np.random.default_rng(0).standard_normal((1, z.size)).astype(np.float32)
    try:
        given, named = copied(_without_stores((frozen.args, frozen.kwargs)), dtype=mx.float32)

        def call(z: mx.array) -> mx.array:
            args, kwargs = layout.exchanged(given, named, layout.native(z))
            return layout.normal(state_in(block(*args, **kwargs)))

        with differentiable(block):
            jacobian = block_jacobian(block, call, mx.array(z))
        expected = frozen.vjp(z, direction)
    except Exception:  # whatever mlx-lm's modules raise, there is a general way
        return None
    error = np.linalg.norm(direction @ jacobian - expected)
    return jacobian if error < TOLERANCE * np.linalg.norm(expected) else None


def _without_stores(thing: Any) -> Any:
    """A call's arguments with caches that store nothing, through which several directions can be sent at once.

    Raises:
        ValueError: a cache of keys and values alone is not what the block has.
    """
    if isinstance(thing, (tuple, list)):
        return type(thing)(map(_without_stores, thing))
    if isinstance(thing, dict):
        return {name: _without_stores(part) for name, part in thing.items()}
    if thing is None or isinstance(thing, (mx.array, nn.Module, str, int, float)):
        return thing
    if not can_roll([thing]):
        raise ValueError(f"a {type(thing).__name__} stores more than keys and values")
    if thing.keys is None:
        return FrozenCache()
    keys, values = (part.astype(mx.float32) for part in in_order(thing))
    return FrozenCache(keys, values, thing.offset)
