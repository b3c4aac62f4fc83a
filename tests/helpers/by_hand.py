"""What the library computes of a model's blocks, got by hand: hooks around the blocks as mlx-lm runs them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from mlx_lqr.backends.hooks import BlockCall
from mlx_lqr.backends.mlx.blocks import hooked
from mlx_lqr.backends.mlx.model import MLXModel
from mlx_lqr.lqr.controller import Controller


def prefix_of(model: MLXModel, tokens: list[int]) -> list[Any]:
    """mlx-lm's own caches after all tokens but the last."""
    cache: list[Any] = make_prompt_cache(model.module)
    model.module(mx.array([tokens[:-1]]), cache=cache)
    return cache


def shifted_output(
    model: MLXModel, tokens: list[int], layer: int, shift: np.ndarray, prefix: list[Any] | None = None
) -> np.ndarray:
    """Output (d,) of block `layer` at the last token when its input there is shifted; every block runs as mlx-lm's.

    Args:
        shift: (d,).
        prefix: what `prefix_of` returned, to use it again; it is as before afterwards.
    """
    outputs: list[mx.array] = []

    def hook(k: int, z: mx.array, call: BlockCall) -> mx.array:
        moved = z.at[0, -1].add(mx.array(shift, z.dtype))
        output = call(moved)
        outputs.append(output[0, -1])
        return output

    cache = prefix_of(model, tokens) if prefix is None else prefix
    with hooked(model.blocks, hook, [layer]):
        model.module(mx.array([tokens[-1:]]), cache=cache)
    output = np.asarray(outputs[0].astype(mx.float64), dtype=np.float64)
    if prefix is not None:
        assert can_trim_prompt_cache(prefix)
        assert trim_prompt_cache(prefix, 1) == 1
    return output


def last_features(model: MLXModel, controller: Controller, run: list[int], strengths: list[float | None]) -> np.ndarray:
    """v_k . z_k (T, m) at the last token of one pass without a cache, position i steered by hand with strengths[i]."""
    features = []

    def hook(k: int, z: mx.array, call: BlockCall) -> mx.array:
        output, x = np.array(call(z)), np.array(z)
        features.append(x[0, -1] @ controller.sensor[k])
        for i, strength in enumerate(strengths):
            if strength is not None:
                error = controller.offset[k] + strength * controller.setpoint[k] - x[0, i] @ controller.sensor[k]
                output[0, i] += controller.gain[k] @ error
        return mx.array(output)

    with hooked(model.blocks, hook, range(model.num_layers)):
        mx.eval(model.module(mx.array([run])))
    return np.array(features)
