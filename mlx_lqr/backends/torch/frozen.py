"""A block as a function of the state at one token, everything else that it is called with frozen.

Its arguments are kept as they are just before the call: caches of any kind, masks, keys shared between layers. Each
evaluation takes copies of them. n states are n sequences of a batch, so that one reverse pass gives A' w for n rows w,
and n rows w = e_i give the Jacobian. Where a block has no derivative, central differences in float32 take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlx_lqr.backends.hooks import BlockCall
from mlx_lqr.backends.protocol import Float32
from mlx_lqr.backends.state_place import state_in
from mlx_lqr.backends.torch.blocks import TANGENTS, full_float32
from mlx_lqr.backends.torch.copying import Copying, Path, copied, tensors_in
from mlx_lqr.backends.torch.layout import Layout, StateHooks

STEP = 1e-2
"""Of differences, times |z| / sqrt(d): rounding and curvature cost about 1e-3 each."""
COPIED_BYTES = 1 << 28
"""How much may be copied for the rows of one evaluation."""


@dataclass(frozen=True, eq=False)
class FrozenBlock:
    """The block at one token, in float32."""

    block: nn.Module
    layout: Layout
    args: list[Any]
    kwargs: dict[str, Any]
    written: frozenset[int]
    """By id, the tensors among the arguments that the block writes into."""
    with_rows: frozenset[Path]
    """The arguments whose first axis grows with the sequences."""
    nbytes: int
    """About how much of the arguments the block uses."""
    differences: bool
    """Whether the block has no derivative that is right."""

    def values(self, z: Float32) -> Float32:
        """phi(z) of rows z (n, d): (n, d)"""
        with _evaluating(self.block), torch.no_grad():
            return self._in_chunks(self._run, z)

    def vjp(self, z: Float32, cotangents: Float32) -> Float32:
        """A' w at z (d,) for rows w (n, d): (n, d)"""
        if self.differences:
            return cotangents @ self.jacobian(z)
        with _evaluating(self.block), torch.enable_grad():
            return self._in_chunks(lambda rows: self._pulled_back(z, rows)[0], cotangents)

    def jvp(self, z: Float32, tangents: Float32) -> Float32:
        """A w at z (d,) for rows w (n, d): (n, d). A derivative of w -> A' w, which is linear."""
        if self.differences:
            return self._differences(z, tangents)
        try:
            with _evaluating(self.block), torch.enable_grad():
                return self._in_chunks(lambda rows: self._pushed_forward(z, rows), tangents)
        except RuntimeError:  # there is a first derivative and no second one
            return self._differences(z, tangents)

    def jacobian(self, z: Float32) -> Float32:
        """A at z (d,): (d, d)"""
        identity = np.eye(z.size, dtype=np.float32)
        return self._differences(z, identity).T if self.differences else self.vjp(z, identity)

    def _run(self, rows: torch.Tensor) -> torch.Tensor:
        copying = Copying(len(rows), self.written, self.with_rows)
        args, kwargs = copying.copy([self.args, self.kwargs])
        args, kwargs = self.layout.exchanged(args, kwargs, self.layout.native(rows[:, None]))
        return self.layout.normal(state_in(self.block(*args, **kwargs)))[:, 0]

    def _pulled_back(self, z: Float32, cotangents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = torch.tensor(z, device=cotangents.device).repeat(len(cotangents), 1).requires_grad_()
        output = self._run(states.clone())  # a block may write into its input
        create = cotangents.requires_grad
        gradients: tuple[torch.Tensor, ...] = torch.autograd.grad(output, states, cotangents, create_graph=create)
        return gradients

    def _pushed_forward(self, z: Float32, tangents: torch.Tensor) -> torch.Tensor:
        cotangents = torch.zeros_like(tangents).requires_grad_()
        (pulled,) = self._pulled_back(z, cotangents)
        return torch.autograd.grad(pulled, cotangents, tangents)[0]

    def _differences(self, z: Float32, tangents: Float32) -> Float32:
        """A w by central differences, each w at the length that STEP says: (n, d)"""
        length = np.linalg.norm(tangents, axis=1, keepdims=True)
        step = STEP * np.linalg.norm(z) / z.size**0.5 / np.where(length > 0, length, 1)
        moved = (step * tangents).astype(np.float32)
        ahead, behind = self.values(z + moved), self.values(z - moved)
        return ((ahead - behind) / (2 * step)).astype(np.float32)

    def _in_chunks(self, function: Callable[[torch.Tensor], torch.Tensor], rows: Float32) -> Float32:
        device = next(self.block.parameters()).device
        size = max(1, min(TANGENTS, COPIED_BYTES // max(1, self.nbytes)))
        result = np.empty(rows.shape, np.float32)
        for start in range(0, len(rows), size):
            some = torch.tensor(rows[start : start + size], dtype=torch.float32, device=device)
            result[start : start + size] = function(some).detach().cpu().numpy()
        return result


class _Snapshots:
    """Copies in float32 of tensors at some moment, one copy of each for all blocks that have it then."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """By id, a tensor and its copy; the tensor too, or another one could get its id."""
        self.nbytes = 0

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._copies:
            copy = tensor.detach().to(_dtype_of(tensor), copy=True)
            self._copies[id(tensor)] = tensor, copy
            self.nbytes += copy.nbytes
        return self._copies[id(tensor)][1]

    def written(self, tensors: Sequence[torch.Tensor]) -> frozenset[int]:
        """By id, the copies of those of the tensors that have been written into since; they are copied anew later.

        Numbers are compared, since a GPU's own kernels leave no other trace.
        """
        written = [tensor for tensor in tensors if not torch.equal(tensor.to(_dtype_of(tensor)), self.of(tensor))]
        return frozenset(id(self._copies.pop(id(tensor))[1]) for tensor in written)


def _dtype_of(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def frozen_at(
    module: nn.Module, layout: Layout, cache: Any, token: int, *, differences: bool, float32: bool = False
) -> tuple[Float32, list[FrozenBlock], int]:
    """z_0..z_T (T + 1, d) at a token after what a cache holds of one sequence, the blocks there, and the bytes held.

    Args:
        cache: is left as it is.
        differences: see `FrozenBlock`.
        float32: whether every block is run in float32.
    """
    calls: list[tuple[list[Any], dict[str, Any], frozenset[int]]] = []
    residual: list[torch.Tensor] = []
    snapshots = _Snapshots()

    def keep(k: int, z: torch.Tensor, call: BlockCall) -> torch.Tensor:
        given = layout.exchanged(call.args, call.kwargs, None)
        args, kwargs = Copying(tensor=snapshots.of).copy(given)
        tensors = tensors_in(given)
        residual.append(z[0, -1])
        output = in_full(layout.blocks[k], z, call) if float32 else call(z)
        calls.append((args, kwargs, snapshots.written(tensors)))
        if k == len(layout.blocks) - 1:
            residual.append(output[0, -1])
        return output

    with torch.no_grad(), StateHooks.of(layout)(layout.blocks, keep, range(len(layout.blocks))).placed():
        layout.call(module, torch.tensor([[token]], device=next(module.parameters()).device), copied(cache))
    stacked = torch.stack([z.float() for z in residual]).cpu().numpy()
    each = snapshots.nbytes // len(calls)
    blocks = [
        FrozenBlock(block, layout, *call, with_rows, each, differences)
        for block, call, with_rows in zip(layout.blocks, calls, layout.with_rows, strict=True)
    ]
    return stacked, blocks, snapshots.nbytes + stacked.nbytes


def in_full(block: nn.Module, z: torch.Tensor, call: BlockCall) -> torch.Tensor:
    """A block's output in float32; what it writes into its cache is in float32 too."""
    with in_float32(block):
        return BlockCall(call.block, _wide(call.args), _wide(call.kwargs))(z.float())


def _wide(thing: Any) -> Any:
    """Arguments with their floating numbers in float32; caches as they are."""
    if isinstance(thing, torch.Tensor):
        return thing.float() if thing.is_floating_point() else thing
    if isinstance(thing, (list, tuple)) and not hasattr(thing, "_fields"):
        return type(thing)(map(_wide, thing))
    if isinstance(thing, dict):
        return {name: _wide(part) for name, part in thing.items()}
    return thing


@contextmanager
def in_float32(module: nn.Module, apart: Sequence[nn.Module] = ()) -> Iterator[None]:
    """The module, without the parts that are `apart`, with all floating numbers in float32; afterwards as it was."""
    others = {id(weight) for part in apart for weight in (*part.parameters(), *part.buffers())}
    weights = [weight for weight in (*module.parameters(), *module.buffers()) if id(weight) not in others]
    narrow = [(weight, weight.data) for weight in weights if weight.dtype in (torch.float16, torch.bfloat16)]
    try:
        for weight, values in narrow:
            weight.data = values.float()
        with full_float32():
            yield
    finally:
        for weight, values in narrow:
            weight.data = values


@contextmanager
def _evaluating(block: nn.Module) -> Iterator[None]:
    """The block in float32, with attention of plain products, and caches that may be written into."""
    with ExitStack() as stack:
        stack.enter_context(in_float32(block))
        stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        stack.enter_context(allow_mutation_on_saved_tensors())
        yield
