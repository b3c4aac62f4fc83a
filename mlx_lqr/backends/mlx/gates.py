"""The gates of MLPs by NumPy, where MLX computes on a CPU of Linux.

There MLX's exp and tanh take one number after another. For a prompt of SmolLM2 they cost as much as the matrices do;
NumPy, with the processor's vector instructions, takes a tenth of the time. Which activation an MLP has is not read from
its code: it is found by comparing outputs, and an MLP that no formula here agrees with stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lqr.backends.hooks import BlockCall
from mlx_lqr.backends.mlx.blocks import ClassHooks
from mlx_lqr.backends.mlx.device import on_gpu, on_linux

LEAST = 8
"""Tokens in a pass below which nothing is gained: NumPy waits until everything before a gate is computed."""
TOLERANCE = 1e-5
"""Relative, of an MLP's output: both are in float32."""
_PIECE = 2**15
"""Numbers that are taken at a time: what is computed of them stays in the processor's cache."""
_PARTS = ("gate_proj", "up_proj", "down_proj")
Activation = Callable[[np.ndarray], np.ndarray]
"""A new array; the one that is given stays."""


def _silu(x: np.ndarray) -> np.ndarray:
    y = np.negative(x)
    np.exp(y, out=y)
    y += 1
    return np.divide(x, y, out=y)


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


ACTIVATIONS: tuple[Activation, ...] = (_silu, _gelu_tanh)


class Gates:
    """The MLPs of a model's blocks that have down(activation(gate(x)) * up(x)), with an activation that is known here.

    Args:
        dtype: of the residual stream; in another than float32 nothing is changed.
        width: d, the size of the MLPs' input.
    """

    def __init__(self, blocks: Sequence[nn.Module], dtype: mx.Dtype, width: int) -> None:
        self._hooks: ClassHooks | None = None
        if on_gpu() or not on_linux() or dtype != mx.float32:
            return
        mlps = [mlp for mlp in (block.get("mlp") for block in blocks) if _is_gated(mlp)]
        found = [(mlp, activation) for mlp in mlps if (activation := _activation_of(mlp, width)) is not None]

        def hook(k: int, x: mx.array, call: BlockCall) -> mx.array:
            return _output(*found[k], x)

        self._hooks = ClassHooks([mlp for mlp, _ in found], hook, range(len(found)))

    def quick(self, tokens: mx.array) -> AbstractContextManager[None]:
        """Inside this context a pass of tokens (B, L) has its gates by NumPy. It must be neither traced by MLX nor
        differentiated, which would go on without them."""
        return nullcontext() if self._hooks is None or tokens.size < LEAST else self._hooks.placed()


def _is_gated(mlp: nn.Module | None) -> bool:
    return mlp is not None and all(isinstance(mlp.get(name), nn.Module) for name in _PARTS)


def _activation_of(mlp: nn.Module, width: int) -> Activation | None:
    """The activation with which the MLP's own output comes out, for small inputs and large ones; None for an MLP that
    gives zeros, where any would do."""
    x = mx.array(np.random.default_rng(0).standard_normal((1, 2, width)) * [[1], [30]], mx.float32)
    expected = np.asarray(mlp(x))[0]
    length = np.linalg.norm(expected, axis=-1)
    for activation in ACTIVATIONS:
        error = np.linalg.norm(np.asarray(_output(mlp, activation, x))[0] - expected, axis=-1)
        if (length > 0).all() and (error <= TOLERANCE * length).all():
            return activation
    return None


def _output(mlp: nn.Module, activation: Activation, x: mx.array) -> mx.array:
    gate, gated = mx.contiguous(mlp.gate_proj(x)), mx.contiguous(mlp.up_proj(x))
    mx.eval(gate, gated)
    rows = [np.asarray(one).reshape(-1, one.shape[-1]) for one in (gate, gated)]  # MLX's own memory
    step = max(1, _PIECE // gate.shape[-1])
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found in the residual stream
        for i in range(0, len(rows[0]), step):
            rows[1][i : i + step] *= activation(rows[0][i : i + step])
    output: mx.array = mlp.down_proj(gated)
    return output
