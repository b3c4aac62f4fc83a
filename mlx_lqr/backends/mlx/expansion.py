"""The Jacobian of a block at a prompt's last token, with its attention and MLP expanded to first order there.

Between the block's input z, its attention (a) and its MLP (m) stand only norms and sums, which cost nothing beside
matrix products. With the slopes J_a and J_m of the two parts, their inputs x_a(z) and x_m(z, a), and the block's output
out(z, a, m), where D f(...) is the derivative of f along the directions in the brackets,

    da = J_a D x_a(I)        dm = J_m D x_m(I, da)        A = D out(I, da, dm)

so that one (d, d) product, and those that form J_a and J_m, make the Jacobian. The slopes take far fewer operations
than d directions through the parts themselves:

    MLP, h = f(W_gate x, W_up x), f elementwise:   J_m = W_down (diag(f_gate) W_gate + diag(f_up) W_up)
    attention, head by head o_h = f_h(q_h, k_h, v_h):   J_a = W_o [f_h,q W_q,h + f_h,k W_k,h + f_h,v W_v,h]_h

Every head depends on its own query, key and value alone, so that one direction serves all heads at once: 3 head_dim of
them give the derivatives f_h,q, f_h,k and f_h,v (head_dim, head_dim), rotary embeddings and norms of heads included.
Parts of another make are not expanded: every direction goes through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lqr.backends.mlx.blocks import TANGENTS

HEADWISE_TOLERANCE = 1e-3
"""How far, relatively, the derivative along a random direction may lie from what independent heads would give."""


def block_jacobian(block: nn.Module, call: Callable[[mx.array], mx.array], z: mx.array) -> np.ndarray:
    """A = d call(z) / dz (d, d) float32 for z (d,), where `call` is one call of the block at a single position.

    The block's weights must be dense and float32.
    """
    values: dict[str, mx.array] = {}  # of the parts that are expanded, (1, 1, d)
    slopes: list[mx.array] = []

    def given(outputs: tuple[mx.array, ...]) -> dict[str, nn.Module]:
        return {name: _constant(output) for name, output in zip(values, outputs, strict=False)}

    def output(z: mx.array, *outputs: mx.array) -> mx.array:
        with _replaced(block, given(outputs)):
            return call(z[None, None]).reshape(-1)

    def arguments(name: str, z: mx.array, *outputs: mx.array) -> Arguments:
        """How the block calls its part `name`, where those before it have these outputs."""
        calls: list[Arguments] = []

        def stop_here(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            calls.append(((x, *args), kwargs))
            return x  # what follows is never evaluated

        with _replaced(block, {**given(outputs), name: _StandIn(stop_here)}):
            call(z[None, None])
        (call_of_part,) = calls
        return call_of_part

    def input_of(name: str) -> Callable[..., mx.array]:
        return lambda z, *outputs: arguments(name, z, *outputs)[0][0].reshape(-1)

    for name, expansion in (("self_attn", _attention_expansion), ("mlp", _mlp_expansion)):
        part = getattr(block, name, None)
        if isinstance(part, nn.Module):
            expanded = expansion(part, *arguments(name, z, *values.values()))
            if expanded is not None:
                values[name], slope = expanded
                slopes.append(slope)

    d = z.size
    names, primals = list(values), (z, *values.values())
    chunks = [slice(start, start + TANGENTS) for start in range(0, d, TANGENTS)]
    if slopes:  # J_a x_a' row by row in reverse mode; in forward mode it would be one more product of matrices
        into = input_of(names[0])
        rows = [mx.vmap(lambda row: mx.vjp(into, (z,), (row,))[1][0])(slopes[0][some]) for some in chunks]
        first = mx.concatenate(rows).T
    jacobian, identity = np.empty((d, d), np.float32), mx.eye(d)
    for some in chunks:
        directions = [identity[some]] + ([first[some].reshape(-1, 1, 1, d)] if slopes else [])
        for i in range(1, len(slopes)):
            inner = _along(input_of(names[i]), primals[: i + 1], directions)
            directions.append((inner @ slopes[i].T).reshape(-1, 1, 1, d))
        jacobian[:, some] = np.asarray(_along(output, primals, directions)).T
    return jacobian


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""args and kwargs of a call"""


def _along(function: Callable[..., mx.array], primals: tuple[mx.array, ...], directions: list[mx.array]) -> mx.array:
    """The function's derivative along n directions, each array of which has n rows."""
    result: mx.array = mx.vmap(lambda *row: mx.jvp(function, primals, row)[1][0])(*directions)
    return result


def _mlp_expansion(mlp: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[mx.array, mx.array] | None:
    """For an MLP of dense gate_proj, up_proj and down_proj without biases."""
    parts = _linear_parts(mlp, "gate_proj", "up_proj", "down_proj")
    if parts is None or any("bias" in part for part in parts):
        return None
    gate, up, down = parts
    x = args[0]

    def hidden(gated: mx.array, lifted: mx.array) -> mx.array:
        stand_ins = {"gate_proj": _constant(gated), "up_proj": _constant(lifted), "down_proj": nn.Identity()}
        with _replaced(mlp, stand_ins):
            return mlp(x)

    primal = gate(x), up(x)
    ones, zeros = mx.ones_like(primal[0]), mx.zeros_like(primal[0])
    (h,), (by_gate,) = mx.jvp(hidden, primal, (ones, zeros))
    _, (by_up,) = mx.jvp(hidden, primal, (zeros, ones))
    by_gate, by_up = by_gate.reshape(-1), by_up.reshape(-1)
    by_rows = np.asarray(gate.weight).flags.c_contiguous  # else a product in this order would jump through memory
    columns = []
    for start in range(0, x.shape[-1], TANGENTS):  # not all at once, which would take the memory of three weights
        some = slice(start, start + TANGENTS)
        if by_rows:
            inner = by_gate[:, None] * gate.weight[:, some] + by_up[:, None] * up.weight[:, some]
        else:
            inner = (gate.weight[:, some].T * by_gate + up.weight[:, some].T * by_up).T
        columns.append(down.weight @ inner)
        mx.eval(columns[-1])
    value, slope = down(h), mx.concatenate(columns, axis=1)
    mx.eval(value, slope)
    return value, slope


def _attention_expansion(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[mx.array, mx.array] | None:
    """For attention of dense q_proj, k_proj, v_proj and o_proj whose heads are independent of one another."""
    names = ("q_proj", "k_proj", "v_proj")
    parts = _linear_parts(attention, *names, "o_proj")
    heads = getattr(attention, "n_heads", None) or getattr(attention, "num_heads", None)
    if parts is None or heads is None:
        return None
    *projections, output = parts
    x = args[0]
    primal = tuple(projection(x) for projection in projections)
    size = primal[0].shape[-1] // heads
    groups = primal[1].shape[-1] // size

    def attended(*qkv: mx.array) -> mx.array:
        stand_ins = {name: _constant(part) for name, part in zip(names, qkv, strict=True)}
        with _replaced(attention, {**stand_ins, "o_proj": nn.Identity()}):
            return attention(*args, **kwargs)

    def along(*directions: mx.array) -> mx.array:
        return mx.jvp(attended, primal, directions)[1][0].reshape(-1)

    one_each, none = mx.eye(size), mx.zeros((size, size))
    random = mx.random.normal((sum(part.shape[-1] for part in primal),), key=mx.random.key(0))
    probe = mx.split(random, [heads * size, (heads + groups) * size])
    directions = []
    for i, count in enumerate((heads, groups, groups)):
        rows = mx.concatenate([one_each if i == j else none for j in range(3)])
        directions.append(mx.concatenate([mx.tile(rows, (1, count)), probe[i][None]])[:, None, None])
    response = mx.vmap(along)(*directions)  # (3 size + 1, heads * size)
    by_part = response[:-1].reshape(3, size, heads, size)

    def through(weights: list[mx.array]) -> mx.array:
        """The sum of f_h,p W_p,h over p = q, k, v for weights (heads or groups, size, n): (heads * size, n)"""
        total = mx.array(0.0)
        for derivative, weight in zip(by_part, weights, strict=True):
            count = weight.shape[0]  # heads // count query heads share a key and a value
            derivative = derivative.transpose(1, 2, 0).reshape(count, -1, size)
            total = total + (derivative @ weight).reshape(heads * size, -1)
        return total

    counts = (heads, groups, groups)
    expected = through([part.reshape(count, size, 1) for part, count in zip(probe, counts, strict=True)])[:, 0]
    error = mx.linalg.norm(expected - response[-1]) / mx.linalg.norm(response[-1])
    if not error.item() < HEADWISE_TOLERANCE:  # as where a norm spans all heads
        return None
    inner = through([part.weight.reshape(count, size, -1) for part, count in zip(projections, counts, strict=True)])
    value, slope = output(attended(*primal)), output.weight @ inner
    mx.eval(value, slope)
    return value, slope


def _linear_parts(module: nn.Module, *names: str) -> list[nn.Linear] | None:
    parts = [getattr(module, name, None) for name in names]
    return parts if all(isinstance(part, nn.Linear) for part in parts) else None


@contextmanager
def _replaced(module: nn.Module, parts: dict[str, nn.Module]) -> Iterator[None]:
    original = {name: getattr(module, name) for name in parts}
    try:
        for name, part in parts.items():
            setattr(module, name, part)
        yield
    finally:
        for name, part in original.items():
            setattr(module, name, part)


def _constant(value: mx.array) -> nn.Module:
    return _StandIn(lambda *args, **kwargs: value)


class _StandIn(nn.Module):
    """A function in a module's place."""

    def __init__(self, function: Callable[..., mx.array]) -> None:
        super().__init__()
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self._function(*args, **kwargs)
