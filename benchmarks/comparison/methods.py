"""What is tuned of each method: the candidates, as many for each, and the strengths that make sense for them.

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
from mlx_lqr.methods import baseline
from mlx_lqr.tasks.records import digest
from mlx_lqr.tasks.tuning import Candidate, Space

Options = Mapping[str, Any]

PAPER = "alqr (paper's defaults)"
CENTRED = "alqr (centred setpoint)"
REMOVES = ("ablation",)
"""Methods that can only take a concept away."""
METHODS = (
    "alqr",
    PAPER,
    CENTRED,
    "proportional",
    "spid",
    "actadd",
    "mean-act",
    "linear-act",
    "pid-act",
    "ablation",
    "angular",
    "iti",
    "odesteer",
)
JACOBIAN_PROMPTS = 4
STRENGTHS: Mapping[str, tuple[float, float]] = {
    "alqr": (0.0, 6.0),
    "proportional": (0.0, 8.0),
    "spid": (0.0, 8.0),
    "actadd": (0.0, 8.0),
    "mean-act": (0.0, 4.0),
    "linear-act": (0.0, 3.0),
    "pid-act": (0.0, 4.0),
    "ablation": (0.0, 1.0),
    "angular": (110.0, 5.0),
    "iti": (0.0, 12.0),
    "odesteer": (0.0, 8.0),
}
"""From no steering to too much."""
TRANSPORT_LAYERS = 4
"""AcT is fitted block after block, a pass over the prompts for each, and so acts at this many of the last blocks."""


@dataclass(frozen=True, eq=False)
class Fitter:
    """Fits a concept's steering on one model."""

    model: Model
    positive: Sequence[Prompt]
    negative: Sequence[Prompt]
    concept: str
    folder: Path
    """Where Jacobians go, which all of A-LQR's candidates share"""

    def __call__(self, method: str, options: Options) -> baseline.Steering:
        sets: Any = (self.positive, self.negative)
        method, options = options.get("method", method), {k: value for k, value in options.items() if k != "method"}
        if method == "alqr":
            return mlx_lqr.fit(self.model, *sets, concept=self.concept, jacobians=self._jacobians(), **options)
        numbers = {name: value for name, value in options.items() if name in mlx_lqr.METHODS[method].numbers}
        others = {name: value for name, value in options.items() if name not in numbers}
        return mlx_lqr.fit_baseline(self.model, method, *sets, concept=self.concept, numbers=numbers, **others)

    def _jacobians(self) -> mlx_lqr.Jacobians:
        nominal = self.positive[:JACOBIAN_PROMPTS]
        store = self.folder / f"jacobians-{digest(list(nominal))}.safetensors"
        store.parent.mkdir(parents=True, exist_ok=True)
        return mlx_lqr.linearize(self.model, nominal, store=store)


def space(fitter: Fitter, method: str) -> Space:
    """The candidates of one method, under the names of their settings."""
    law = "alqr" if method in (PAPER, CENTRED) else method
    settings = _settings(method, fitter.model.num_layers)

    def candidate(chosen: Options) -> Candidate:
        options = settings[chosen["setting"]]
        return Candidate(chosen["setting"], chosen, lambda: fitter(law, options), STRENGTHS[law])

    prompts = digest([list(fitter.positive), list(fitter.negative)])
    return Space({"setting": list(settings)}, candidate, {"method": law, "settings": settings, "prompts": prompts})


def _settings(method: str, T: int) -> dict[str, dict[str, Any]]:
    """The options of fitting behind each setting's name."""
    third, half = list(range(2 * T // 3, T)), list(range(T // 2, T))
    last = list(range(max(0, T - TRANSPORT_LAYERS), T))
    auto: dict[str, Any] = {"layers": "auto", "q": 3.0, "qf": 3.0}
    spread = half[:: max(1, len(half) // TRANSPORT_LAYERS)][:TRANSPORT_LAYERS]
    if method == "alqr":
        return {
            "layers auto, q/r 3": {**auto, "setpoint": "paper"},
            "layers auto, q/r 3, feature cost": {**auto, "setpoint": "paper", "cost": "feature"},
        }
    if method == CENTRED:
        return {"layers auto, q/r 3": {**auto, "setpoint": "centred"}}
    if method == PAPER:
        return {"all layers, q/r 0.1": {"layers": "all", "q": 0.1, "qf": 0.1, "setpoint": "paper"}}
    if method == "proportional":
        return {
            "layers auto, kp 0.4": {"layers": "auto", "kp": 0.4},
            "last third, kp 0.4": {"layers": third, "kp": 0.4},
        }
    if method == "spid":
        return {
            "layers auto, kp 0.5, ki 0.05": {"layers": "auto"},
            "last third, kp 0.5, ki 0.05": {"layers": third},
        }
    if method == "odesteer":
        return {"middle layer": {"layers": [T // 2]}, "layer at two thirds": {"layers": [2 * T // 3]}}
    if method == "actadd":
        return {"layer at two thirds": {"layers": [2 * T // 3]}, "last third": {"layers": third}}
    if method == "ablation":
        return {
            "all layers, direction of three fifths": {"source_layer": 3 * T // 5},
            "last half, direction of two thirds": {"layers": half, "source_layer": 2 * T // 3},
        }
    if method == "angular":
        return {
            "middle layer": {"layers": [T // 2]},
            "middle layer, adaptive": {"layers": [T // 2], "method": "adaptive-angular"},
        }
    if method == "iti":
        return {"heads of all layers": {}, "heads of the last half": {"layers": half}}
    return {f"last {len(last)} layers": {"layers": last}, f"{len(spread)} layers of the last half": {"layers": spread}}
