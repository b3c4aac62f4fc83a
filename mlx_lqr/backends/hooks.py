"""A law as hooks around a model's blocks, the same for every backend that runs a model's own modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lqr.backends.protocol import Array, Law


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


class LawHooks:
    """A law as hooks, one for blocks and one for their attention's output projections; it acts in one of them.

    Args:
        law: placed; None where nothing steers.
        act: (k, z, output) -> output as it is to be, where not all positions are steered; by default the law itself.
    """

    @classmethod
    def at(cls, law: Law | None, steered: Array, where: Callable[[Array, Array, Array], Array]) -> LawHooks:
        """The law at the positions of a call that `steered` (B, L, 1) tells, by the backend's `where`."""

        def act(k: int, z: Array, output: Array) -> Array:
            assert law is not None
            return where(steered, law(k, z, output), output)

        return cls(law, act)

    @classmethod
    def beyond(
        cls,
        law: Law,
        first: Callable[[], int | Array],
        concatenate: Callable[[list[Array], int], Array],
        where: Callable[[Array, Array, Array], Array],
    ) -> LawHooks:
        """The law from position `first()` of a call on, or at the positions (B, L, 1) that it tells.

        Args:
            concatenate, where: the backend's; the former takes arrays and an axis.
        """

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
