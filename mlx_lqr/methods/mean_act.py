"""Mean-AcT, activation transport of the mean (Rodriguez et al. 2024, arXiv 2410.23054).

y + s b_k, where b_k takes the mean of the negative prompts' activations, steered before block k, to that of the
positive ones'. The paper averages over a prompt's tokens and acts on the outputs of norms; here both are the last
token's residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_lqr.methods.addition import Addition
from mlx_lqr.methods.baseline import Baseline
from mlx_lqr.methods.method import Paper, StrengthScale
from mlx_lqr.methods.sequential import SequentialMethod, Transport, mean_difference


class MeanAcT(SequentialMethod):
    name = "mean-act"
    title = "Mean-AcT"
    papers = (Paper("Rodriguez et al.", 2024, "2410.23054"),)
    formula = "`y + s b`, each layer fitted with those before it steered"
    strengths = StrengthScale("1 takes the negative prompts' mean all the way to the positive ones'", span=(0.0, 4.0))
    tensors: Mapping[str, str] = {"shift": "Tdm"}
    identity: Mapping[str, float] = {"shift": 0.0}

    def transport(self, options: Mapping[str, Any]) -> Transport:
        return lambda source, target: {"shift": mean_difference(source, target)}

    def law(self, steering: Baseline, strength: float | Sequence[float]) -> Addition:
        return Addition(steering, strength)
