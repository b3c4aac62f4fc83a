"""What is tuned of each method: the candidates, as many for each, and the strengths that make sense for them.

All act where steering does the least damage to these models, in the last third or half of the blocks; methods that act
at one block get two places for it. Ranges of strength are wide, from hardly anything to too much.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_lqr
from benchmarks.comparison.tuning import Candidate
from mlx_lqr import baseline
from mlx_lqr.backends.base import Model
from mlx_lqr.contrast import Prompt

Options = Mapping[str, Any]

PAPER = "alqr (paper's defaults)"
REMOVES = ("ablation",)
"""Methods that can only take a concept away."""
METHODS = (
    "alqr",
    PAPER,
    "proportional",
    "spid",
    "actadd",
    "mean-act",
    "linear-act",
    "pid-act",
    "ablation",
    "angular",
    *(name for name in ("iti",) if name in mlx_lqr.METHODS),
)
JACOBIAN_PROMPTS = 4
TRANSPORT_LAYERS = 4
"""AcT is fitted block after block, a pass over the prompts for each, and so acts at this many of the last blocks."""


@dataclass(frozen=True, eq=False)
class Fitter:
    """Fits a concept's steering on one model; what was fitted before is read from the folder."""

    model: Model
    positive: Sequence[Prompt]
    negative: Sequence[Prompt]
    concept: str
    folder: Path

    def __call__(self, method: str, options: Options) -> baseline.Steering:
        path = self.folder / f"{method}-{self._digest(options)}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fit(method, options).save(path)
        return baseline.load_steering(path)

    def _fit(self, method: str, options: Options) -> baseline.Steering:
        sets: Any = (self.positive, self.negative)
        if method == "alqr":
            return mlx_lqr.fit(self.model, *sets, concept=self.concept, jacobians=self._jacobians(), **options)
        numbers = {name: value for name, value in options.items() if name in mlx_lqr.METHODS[method].numbers}
        others = {name: value for name, value in options.items() if name not in numbers}
        return mlx_lqr.fit_baseline(self.model, method, *sets, concept=self.concept, numbers=numbers, **others)

    def _jacobians(self) -> mlx_lqr.Jacobians:
        store = self.folder / f"jacobians-{self._digest({})}.safetensors"
        return mlx_lqr.linearize(self.model, self.positive[:JACOBIAN_PROMPTS], store=store)

    def _digest(self, options: Options) -> str:
        made_of = [dict(options), list(self.positive), list(self.negative)]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]


def space(fitter: Fitter, method: str) -> list[Candidate]:
    """The candidates of one method; the paper's own defaults are the one candidate of theirs."""
    law = "alqr" if method == PAPER else method
    return [
        Candidate(law, options, functools.partial(fitter, law, options), strengths)
        for options, strengths in _choices(method, fitter.model.num_layers)
    ]


def _choices(method: str, T: int) -> Sequence[tuple[dict[str, Any], tuple[float, float]]]:
    third, half = {"layers": list(range(2 * T // 3, T))}, {"layers": list(range(T // 2, T))}
    middle, later = {"layers": [T // 2]}, {"layers": [2 * T // 3]}
    few = {"layers": list(range(max(0, T - TRANSPORT_LAYERS), T))}
    spread = {"layers": list(range(T // 2, T, max(1, (T - T // 2) // TRANSPORT_LAYERS)))[:TRANSPORT_LAYERS]}
    setpoint, share = (0.5, 10.0), (0.2, 6.0)
    pairs: dict[str, tuple[Callable[[], Any], tuple[float, float]]] = {
        "alqr": (lambda: ({**third, "q": 1.0, "qf": 1.0}, {**half, "q": 0.3, "qf": 0.3}), setpoint),
        PAPER: (lambda: ({"q": 0.1, "qf": 0.1},), setpoint),
        "proportional": (lambda: ({**third, "kp": 0.4}, {**half, "kp": 0.15}), setpoint),
        "spid": (lambda: (third, {**half, "kp": 0.15, "ki": 0.02}), setpoint),
        "actadd": (lambda: (later, third), (0.25, 16.0)),
        "mean-act": (lambda: (few, spread), share),
        "linear-act": (lambda: (few, spread), share),
        "pid-act": (lambda: (few, spread), share),
        "ablation": (lambda: ({"source_layer": 3 * T // 5}, {**half, "source_layer": 2 * T // 3}), (0.1, 1.0)),
        "angular": (lambda: (middle, later), (100.0, 10.0)),
        "iti": (lambda: ({}, {"positions": "all"}), (1.0, 60.0)),
    }
    candidates, strengths = pairs[method]
    return [(options, strengths) for options in candidates()]
