"""ActAdd (Turner et al. 2023, arXiv 2308.10248) and CAA (Rimsky et al. 2024, 2312.06681): add the mean difference.

y + s b_k with b_k = e_{k+1}, the mean last-token activations of the positive prompts less those of the negative ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_lqr.methods.addition import Addition
from mlx_lqr.methods.baseline import Baseline, BaselineMethod
from mlx_lqr.methods.contrasted import contrasted
from mlx_lqr.methods.method import Compared, DefaultLayers, Paper, Problem, StrengthScale


class ActAdd(BaselineMethod):
    name = "actadd"
    title = "ActAdd / CAA"
    papers = (
        Paper("Turner et al.", 2023, "2308.10248", "ActAdd"),
        Paper("Rimsky et al.", 2024, "2312.06681", "CAA"),
    )
    formula = "`y + s e`"
    layers: DefaultLayers = "middle"
    layers_to_try = ("middle", "two thirds", "a third", "auto")
    strengths = StrengthScale("1 goes all the way from the negative to the positive prompts' mean", span=(0.0, 10.0))
    tensors: Mapping[str, str] = {"shift": "Tdm"}

    def fit(self, problem: Problem, options: Mapping[str, Any]) -> Baseline:
        sets = contrasted(problem, self.layers)
        shift = (sets.active * sets.outputs)[:, :, None]
        return replace(self.blank(problem, options), tensors={"shift": shift}, active_layers=sets.layers)

    def law(self, steering: Baseline, strength: float | Sequence[float]) -> Addition:
        return Addition(steering, strength)

    def compared(self, num_layers: int) -> Compared:
        T = num_layers
        single, third = [2 * T // 3], list(range(2 * T // 3, T))
        return {self.name: {"layer at two thirds": {"layers": single}, "last third": {"layers": third}}}
