"""The fit that the AcT family shares: block after block, each with the blocks before it steered.

Activation transport (Rodriguez et al. 2024) maps the negative prompts' activations onto the positive ones'. What is
done at one block changes what the next one sees, so that the papers fit the first block, steer it, run the negative
prompts again, fit the second, and so on: a pass over the negative prompts for each block. All at once, on the
unsteered model, is cheaper and less exact.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_lqr.backends.protocol import Float32
from mlx_lqr.lqr.controller import Positions
from mlx_lqr.methods.baseline import Baseline, BaselineMethod
from mlx_lqr.methods.contrasted import contrasted
from mlx_lqr.methods.method import Compared, DefaultLayers, Option, Problem

COMPARED_LAYERS = 4

INCREMENTAL = Option(
    "incremental",
    bool,
    True,
    "Fit each layer with those before it steered, a pass over the negative prompts for each (the papers' way), or all "
    "layers at once.",
    tries=(True, False),
    off="simultaneous",
)

Transport = Callable[[Float32, Float32], Mapping[str, np.ndarray]]
"""Called for each block in turn with its outputs under the negative prompts (n, d) and under the positive ones (m, d);
returns what each tensor holds for this block, (d,)."""


class SequentialMethod(BaselineMethod):
    """A method that is fitted block after block. A subclass says what it does at one, in `transport`."""

    positions: Positions = "all"
    layers: DefaultLayers = "all"
    options: Sequence[Option] = (INCREMENTAL,)
    identity: Mapping[str, float]
    """What each tensor holds at a block where nothing is done."""

    @abstractmethod
    def transport(self, options: Mapping[str, Any]) -> Transport:
        """The fit of one block; it may remember the blocks before."""

    def fit(self, problem: Problem, options: Mapping[str, Any]) -> Baseline:
        sets = contrasted(problem, self.layers)
        T, d = problem.model.num_layers, problem.model.hidden_size
        tensors = {name: np.full((T, d), value, np.float32) for name, value in self.identity.items()}
        source, transport = sets.negative, self.transport(options)
        fitted = self.blank(problem, options)
        for done, k in enumerate(sets.layers):
            if options["incremental"] and done:
                steer_all = fitted.positions == "all"
                source = problem.model.residuals(problem.negative, law=self.law(fitted, 1.0), steer_all=steer_all)
            for name, row in transport(source[:, k + 1], sets.positive[:, k + 1]).items():
                tensors[name][k] = row
            kept = {name: part[..., None] if "m" in self.tensors[name] else part for name, part in tensors.items()}
            fitted = replace(fitted, tensors=kept, active_layers=sets.layers[: done + 1])
            if problem.progress:
                problem.progress("Transport", done + 1, len(sets.layers))
        return fitted

    def compared(self, num_layers: int) -> Compared:
        """The last blocks, and as many spread over the last half: a block costs a pass over the prompts."""
        T = num_layers
        last, half = list(range(max(0, T - COMPARED_LAYERS), T)), list(range(T // 2, T))
        spread = half[:: max(1, len(half) // COMPARED_LAYERS)][:COMPARED_LAYERS]
        settings: dict[str, dict[str, Any]] = {
            f"last {len(last)} layers": {"layers": last},
            f"{len(spread)} layers of the last half": {"layers": spread},
        }
        return {self.name: settings}


def mean_difference(source: Float32, target: Float32) -> np.ndarray:
    """From the mean of source (n, d) to that of target (m, d): (d,), float64"""
    return np.asarray(target.mean(axis=0, dtype=np.float64) - source.mean(axis=0, dtype=np.float64))
