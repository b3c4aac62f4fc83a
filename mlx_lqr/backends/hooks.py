"""A law as hooks around a model's blocks, the same for every backend that runs a model's own modules.

A hook stands in for a block, or for a part of it, inside the model's own forward pass with its own masks and scalings.
So one mechanism records, linearises and steers, and works for every family.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from mlx_lqr.backends.protocol import Array, Law
from mlx_lqr.errors import InputError


@dataclass(frozen=True)
class BlockCall:
    """One call of a block as the model made it, mask and cache included; a function of its input z (B, L, d)."""

    block: Callable[..., Array]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, z: Array) -> Array:
        return self.block(z, *self.args, **self.kwargs)


Hook = Callable[[int, Array, BlockCall], Array]
"""hook(k, z, call) -> output: stands in for block k, or for a part of it, whose own output is call(z)."""
Where = Callable[[Array, Array, Array], Array]
"""where(condition, a, b), the backend's"""
Concatenate = Callable[[Sequence[Array], int], Array]
"""concatenate(arrays, axis), the backend's"""


class LawHooks:
    """A law as hooks, one for blocks and one for their attention's output projections; it acts in one of them.

    Args:
        law: placed; None where nothing steers.
        act: (k, z, output) -> output as it is to be, where not all positions are steered; by default the law itself.
    """

    @classmethod
    def at(cls, law: Law | None, steered: Array, where: Where) -> LawHooks:
        """The law at the positions of a call for which `steered` (B, L, 1) is true."""

        def act(k: int, z: Array, output: Array) -> Array:
            assert law is not None
            return where(steered, law(k, z, output), output)

        return cls(law, act)

    @classmethod
    def beyond(cls, law: Law, first: Callable[[], int | Array], concatenate: Concatenate, where: Where) -> LawHooks:
        """The law from position `first()` of a call on, or where `first()` (B, L, 1) is true."""

        def act(k: int, z: Array, output: Array) -> Array:
            unsteered = first()
            if not isinstance(unsteered, int):
                return where(unsteered, law(k, z, output), output)
            if unsteered >= z.shape[1]:
                return output
            if unsteered == 0:
                return law(k, z, output)
            return concatenate([output[:, :unsteered], law(k, z[:, unsteered:], output[:, unsteered:])], 1)

        return cls(law, act)

    def __init__(self, law: Law | None, act: Callable[[int, Array, Array], Array] | None = None) -> None:
        layers = tuple(law.layers) if law is not None else ()
        inside = law is not None and law.site == "attention"
        self._act: Any = act or law
        self._blocks = frozenset(() if inside else layers)
        self.projections: Sequence[int] = layers if inside else ()
        """The layers whose output projection needs its hook."""

    def block(self, k: int, z: Array, call: BlockCall) -> Array:
        output = call(z)
        return self._act(k, z, output) if k in self._blocks else output

    def projection(self, k: int, heads: Array, call: BlockCall) -> Array:
        return self._act(k, heads, call(heads))


UNSTEERED = LawHooks(None)


class BlockHooks(ABC):
    """A hook for the blocks at `layers`, which is placed and taken off at every pass.

    Args:
        law: where it acts inside blocks, its hook is placed there too.
    """

    library: ClassVar[str]
    """Whose models these are, as a message names it."""

    def __init__(self, blocks: Sequence[Any], hook: Hook, layers: Iterable[int], law: LawHooks = UNSTEERED) -> None:
        self._hooked = [(k, blocks[k], hook) for k in layers]
        self._hooked += [(k, output_projection(blocks[k]), law.projection) for k in law.projections]
        self._thread: int | None = None

    @contextmanager
    def placed(self, *, for_all: bool = False) -> Iterator[None]:
        """Inside this context every call of the blocks goes through the hook.

        Args:
            for_all: calls of all threads, and not those of this one alone.
        """
        before = [(module, self._call_of(module)) for _, module, _ in self._hooked]
        try:
            for _, module, _ in self._hooked:
                self.refuse(module)
            self._thread = None if for_all else threading.get_ident()
            for k, module, hook in self._hooked:
                self._place(k, module, hook)
            yield
        finally:
            for module, call in before:
                self._put_back(module, call)

    def _is_mine(self) -> bool:
        """Whether the hook is for calls of the thread that asks."""
        return self._thread is None or self._thread == threading.get_ident()

    @classmethod
    def refuse(cls, module: Any) -> None:
        """Raise `InputError` for a block that has a hook already."""
        if cls._is_hooked(module):
            raise InputError(
                f"the model is being steered by mlx_lqr.steer: call {cls.library}'s functions inside the block; "
                "outside it, mlx_lqr.generate and the like take the controller themselves"
            )

    @staticmethod
    @abstractmethod
    def _is_hooked(module: Any) -> bool: ...

    @abstractmethod
    def _call_of(self, module: Any) -> Any:
        """What a call of the module does at present; `_put_back` takes it."""

    @abstractmethod
    def _place(self, k: int, module: Any, hook: Hook) -> None:
        """Let calls of the module, block k or a part of it, go through the hook."""

    @abstractmethod
    def _put_back(self, module: Any, call: Any) -> None: ...


def output_projection(block: Any) -> Any:
    """What the block's attention puts its heads through; every supported family has it under this name."""
    return block.self_attn.o_proj
