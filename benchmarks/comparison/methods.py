"""What is tuned of each method: the settings that its file names (`Method.compared`), a handful for each.

All act where steering does the least damage to these models, in the last third or half of the blocks; methods that act
at one block get two places for it. A method's own strengths are searched from nothing to too much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_lqr
from mlx_lqr.backends.protocol import Model
from mlx_lqr.lqr.prompts import Prompt
from mlx_lqr.methods.method import Method
from mlx_lqr.methods.steering import Steering
from mlx_lqr.tasks.records import digest
from mlx_lqr.tasks.tuning import Candidate, Space

LAYERS = 12
"""Of a model to list the rows for, whose names do not depend on it."""
ROWS: Mapping[str, Method[Any]] = {
    row: method for method in mlx_lqr.METHODS.values() for row in method.compared(LAYERS)
}
"""The rows of the tables: every method under its name, and A-LQR also in other settings."""
METHODS = tuple(ROWS)
PAPER = "alqr (paper's defaults)"
REMOVES = tuple(row for row, method in ROWS.items() if method.removes_only)
"""Methods that can only take a concept away."""
WITHOUT_CURVE = tuple(
    row for row, method in ROWS.items() if row != "alqr" and (method.name == "alqr" or method.strengths.period)
)
"""Other settings of A-LQR, and methods whose strength is an angle: they have no strengths in common with others."""
JACOBIAN_PROMPTS = 4

Setting = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Fitter:
    """Fits a concept's steering on one model."""

    model: Model
    positive: Sequence[Prompt]
    negative: Sequence[Prompt]
    concept: str
    folder: Path
    """Where Jacobians go, which all of A-LQR's candidates share"""

    def __call__(self, method: str, setting: Setting) -> Steering:
        method = setting.get("method", method)
        options = {name: value for name, value in setting.items() if name != "method"}
        if any(option.name == "jacobians" for option in mlx_lqr.METHODS[method].options):
            options["jacobians"] = self._jacobians()
        sets = self.positive, self.negative
        return mlx_lqr.fit_baseline(self.model, method, *sets, concept=self.concept, **options)

    def _jacobians(self) -> mlx_lqr.Jacobians:
        nominal = self.positive[:JACOBIAN_PROMPTS]
        store = self.folder / f"jacobians-{digest(list(nominal))}.safetensors"
        store.parent.mkdir(parents=True, exist_ok=True)
        return mlx_lqr.linearize(self.model, nominal, store=store)


def space(fitter: Fitter, row: str) -> Space:
    """The candidates of one row, under the names of their settings."""
    method = ROWS[row]
    settings = method.compared(fitter.model.num_layers)[row]
    strengths = method.compared_strengths or method.strengths.span

    def candidate(chosen: Mapping[str, Any]) -> Candidate:
        setting = settings[chosen["setting"]]
        return Candidate(chosen["setting"], chosen, lambda: fitter(method.name, setting), strengths)

    prompts = digest([list(fitter.positive), list(fitter.negative)])
    return Space(
        {"setting": list(settings)}, candidate, {"method": method.name, "settings": settings, "prompts": prompts}
    )
