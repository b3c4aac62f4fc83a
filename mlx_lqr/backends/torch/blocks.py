"""Hooks on the blocks of a transformers model, or on parts of them; a block at one token as a function of its input.

Every block gets a `forward` of its own, which passes through the hook, and loses it afterwards. Module tree, parameters
and classes are untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, jvp, vjp, vmap

from mlx_lqr.backends.hooks import UNSTEERED, BlockCall, BlockHooks, Hook, LawHooks
from mlx_lqr.backends.torch.attention import attending
from mlx_lqr.backends.torch.cache import FrozenCache
from mlx_lqr.backends.torch.library import dense_experts

TANGENTS = 512
"""Directions differentiated at once: enough for full speed, and little memory beside a wide model's matrices."""


class ForwardHooks(BlockHooks):
    """Hooks by a `forward` of the module's own, which is made once."""

    library = "transformers"

    def __init__(
        self, blocks: Sequence[nn.Module], hook: Hook, layers: Iterable[int], law: LawHooks = UNSTEERED
    ) -> None:
        super().__init__(blocks, hook, layers, law)
        self._forwards = {id(module): self._marked(k, module, hook) for k, module, hook in self._hooked}
        for _, module, _ in self._hooked:
            self.refuse(module)

    @staticmethod
    def _is_hooked(module: nn.Module) -> bool:
        return getattr(module.__dict__.get("forward"), "is_hook", False)

    def _call_of(self, module: nn.Module) -> Any:
        return module.__dict__.get("forward")

    def _place(self, k: int, module: nn.Module, hook: Hook) -> None:
        module.__dict__["forward"] = self._forwards[id(module)]

    def _put_back(self, module: nn.Module, call: Any) -> None:
        if call is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = call

    def _marked(self, k: int, module: nn.Module, hook: Hook) -> Callable[..., Any]:
        forward = self._through(k, module, hook)
        forward.is_hook = True  # type: ignore[attr-defined]
        return forward

    def _through(self, k: int, module: nn.Module, hook: Hook) -> Callable[..., Any]:
        """A forward that passes through the hook."""
        original = module.forward

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not self._is_mine():
                return original(hidden_states, *args, **kwargs)
            return hook(k, hidden_states, BlockCall(original, args, kwargs))

        return forward


def hooked(
    blocks: Sequence[nn.Module], hook: Hook, layers: Iterable[int], law: LawHooks = UNSTEERED
) -> AbstractContextManager[None]:
    """Inside this context every call of the blocks at `layers` goes through `hook` (see `BlockHooks`)."""
    return ForwardHooks(blocks, hook, layers, law).placed()


@dataclass(frozen=True)
class FrozenBlock:
    """A block at one token, everything before it frozen: a function of its input z (d,) alone, in float32."""

    block: nn.Module
    config: Any
    frozen: FrozenCache
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def products(self, product: Any, z: torch.Tensor, directions: torch.Tensor) -> Iterator[torch.Tensor]:
        """`product` (torch.func.jvp or vjp) of the block at z (d,) for rows of directions (n, d), some at a time."""
        with self._in_float32() as function:
            yield from _along(function, product, z, directions)

    def values(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """The block's output for rows of inputs (n, d), some at a time."""
        with self._in_float32() as function:
            yield from (vmap(function)(some) for some in rows.split(TANGENTS))

    def jacobian_columns(self, z: torch.Tensor) -> Iterator[torch.Tensor]:
        """The columns of the block's Jacobian at z (d,), in order, some at a time: (n, d)."""
        directions = torch.eye(len(z), device=z.device)
        with self._in_float32() as function, _affine_mlp(self.block, lambda: function(z)):
            yield from _along(function, jvp, z, directions)

    @contextmanager
    def _in_float32(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """The block as a function of z (d,), in whatever dtype its weights are kept."""
        weights = {name: weight.float() for name, weight in self.block.named_parameters()}

        def function(z: torch.Tensor) -> torch.Tensor:
            present = {name: weights[name] for name, _ in self.block.named_parameters()}
            return functional_call(self.block, present, (z[None, None], *self.args), self.kwargs)[0, 0]

        with attending(self.config, self.frozen), dense_experts(self.config), full_float32():
            yield function


def _along(
    function: Callable[[torch.Tensor], torch.Tensor], product: Any, z: torch.Tensor, directions: torch.Tensor
) -> Iterator[torch.Tensor]:
    def along(direction: torch.Tensor) -> torch.Tensor:
        if product is jvp:
            return jvp(function, (z,), (direction,))[1]
        return vjp(function, z)[1](direction)[0]

    for rows in directions.split(TANGENTS):
        yield vmap(along)(rows)


@contextmanager
def _affine_mlp(block: nn.Module, run: Callable[[], torch.Tensor]) -> Iterator[None]:
    """The block with its MLP replaced by its first-order expansion at the input that `run()`, a call of the block,
    gives it: the same value and derivatives there, as one (d, d) product instead of three wide ones.

    For h = f(W_gate x) o W_up x the MLP's Jacobian is W_down (diag(f' o W_up x) W_gate + diag(f) W_up). Forming it
    costs one wide product where d directions through the MLP cost three. MLPs of another make stay.
    """
    mlp = dict(block.named_children()).get("mlp")
    if mlp is None or not _is_gated(mlp):
        yield
        return
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = mlp.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    try:
        run()
    finally:
        handle.remove()
    ((x, value),) = seen
    slope = _mlp_jacobian(mlp, x.reshape(-1))
    try:
        block.mlp = _StandIn(lambda z: value + (z - x) @ slope.T)
        yield
    finally:
        block.mlp = mlp


def _is_gated(mlp: nn.Module) -> bool:
    """Whether it is down_proj(act_fn(gate_proj(x)) * up_proj(x)) of dense weights without biases."""
    parts = dict(mlp.named_children())
    dense = [parts.get(name) for name in ("gate_proj", "up_proj", "down_proj")]
    are_dense = all(isinstance(part, nn.Linear) and part.bias is None for part in dense)
    return are_dense and set(parts) == {"gate_proj", "up_proj", "down_proj", "act_fn"}


def _mlp_jacobian(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """d MLP / d x (d, d) in float32 at x (d,)."""
    gate, up, down = (part.weight.float() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    gated, lifted = gate @ x, up @ x
    value, derivative = jvp(mlp.act_fn, (gated,), (torch.ones_like(gated),))
    slope = x.new_zeros(len(x), len(x))
    for start in range(0, len(gated), 4 * TANGENTS):  # not all at once, which would take the memory of two weights
        some = slice(start, start + 4 * TANGENTS)
        inner = (derivative * lifted)[some, None] * gate[some] + value[some, None] * up[some]
        slope.addmm_(down[:, some], inner)
    return slope


class _StandIn(nn.Module):
    """A function in a module's place."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._function(x)


@contextmanager
def full_float32() -> Iterator[None]:
    """float32 products in float32, and not in the ten bits that a GPU may have been allowed to take instead."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
