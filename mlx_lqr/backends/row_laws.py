"""The laws of sequences decoded side by side, each with its own, or with none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlx_lqr.backends.framework import Framework
from mlx_lqr.backends.hooks import BlockCall, LawHooks
from mlx_lqr.backends.protocol import AddProduct, Array, Law, Renew, Site, StackableLaw


class RowLaws:
    """Row i of a pass is steered by law i, if there is one (see `Law`).

    Laws that can be stacked steer all their rows in one operation; any other steers its own row alone. One that fails
    leaves its row as it is, and its exception in `failures`, so that the others' passes go on.

    Args:
        laws: placed, a row each. One that carries something from token to token is of that row alone.
    """

    site: Site = "block"
    """Of calls; what its laws change inside attention is a matter of `hooks` alone."""

    def __init__(self, framework: Framework, laws: Sequence[Law | None]) -> None:
        self.laws = tuple(laws)
        self._framework = framework
        self.failures: dict[int, Exception] = {}
        """By row, why its law has failed."""
        self._first = 0
        """Under which number the first row's failure is noted"""
        present = [law for law in laws if law is not None]
        self.layers: Sequence[int] = sorted({k for law in present for k in law.layers})
        self._sites = {site: _SiteLaws(framework, self, site) for site in {law.site for law in present}}
        self.replayable = all(law.replayable for law in present)

    def to(
        self, array: Callable[[np.ndarray], Array], add_product: AddProduct, *, renew: Renew | None = None
    ) -> RowLaws:
        """Itself, since its laws are placed."""
        return self

    @property
    def acts(self) -> bool:
        return any(law is not None and law.acts for law in self.laws)

    def aim(self) -> None:
        """See `Law`."""
        for laws in self._sites.values():
            laws.aim()

    def __call__(self, layer: int, z: Array, output: Array) -> Array:
        laws = self._sites.get("block")
        return laws(layer, z, output) if laws is not None and layer in laws.layers else output

    def keep(self, rows: Sequence[int]) -> RowLaws:
        """The laws of these rows."""
        return RowLaws(self._framework, [self.laws[row] for row in rows])

    def of_row(self, row: int) -> RowLaws:
        """The law of one row, for passes of that row alone; failures are noted here."""
        alone = self.keep([row])
        alone.failures, alone._first = self.failures, row
        return alone

    def steered(self, row: int, law: Law, layer: int, z: Array, output: Array) -> Array:
        """What a law makes of its row, which stays as it is once the law has failed."""
        number = self._first + row
        try:
            return output if number in self.failures else law(layer, z, output)
        except Exception as error:  # whatever a law of any package may raise
            self.failures[number] = error
            return output

    def hooks(self) -> LawHooks:
        """What steers blocks, and attention inside them."""
        return _RowHooks(self, self._sites.get("attention"))


class _SiteLaws:
    """Those of one site."""

    def __init__(self, framework: Framework, rows: RowLaws, site: Site) -> None:
        self._rows, self._framework = rows, framework
        own = [law if law is not None and law.site == site else None for law in rows.laws]
        self.layers: Sequence[int] = sorted({k for law in own if law is not None for k in law.layers})
        self._stacks: list[Law] = []
        self._alone: dict[int, Law] = {}
        kinds: dict[Any, list[Law | None]] = {}
        for row, law in enumerate(own):
            if isinstance(law, StackableLaw) and len(own) > 1:
                kinds.setdefault(type(law).stacked, [None] * len(own))[row] = law
            elif law is not None:
                self._alone[row] = law
        for laws in kinds.values():
            first = next(law for law in laws if law is not None)
            assert isinstance(first, StackableLaw)
            stack = first.stacked(laws)
            self._stacks.append(framework.place(stack))

    def aim(self) -> None:
        for law in [*self._stacks, *self._alone.values()]:
            law.aim()

    def __call__(self, layer: int, z: Array, output: Array) -> Array:
        for stack in self._stacks:
            if layer in stack.layers:
                output = stack(layer, z, output)
        alone = [row for row, law in self._alone.items() if layer in law.layers]
        if not alone:
            return output
        parts, start = [], 0
        for row in alone:
            one = slice(row, row + 1)
            parts += [output[start:row], self._rows.steered(row, self._alone[row], layer, z[one], output[one])]
            start = row + 1
        parts.append(output[start:])
        return self._framework.concatenate([part for part in parts if part.shape[0]], 0)


class _RowHooks(LawHooks):
    """The laws of a batch at blocks, and inside attention."""

    def __init__(self, laws: RowLaws, inside: _SiteLaws | None) -> None:
        super().__init__(laws)
        self._inside = inside
        self.projections = inside.layers if inside is not None else ()

    def projection(self, k: int, heads: Array, call: BlockCall) -> Array:
        assert self._inside is not None
        return self._inside(k, heads, call(heads))
