"""PID-AcT (Nguyen et al. 2025, arXiv 2510.04309): a PID controller over the layers in place of Mean-AcT's mean.

y + s b_k with b_k = kp r_k + ki sum_{j<k} r_j + kd (r_k - r_{k-1}), where r_k is what Mean-AcT fits at block k and
the sum goes over the blocks before that are steered. The paper leaves its gains to be tuned; the defaults are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_lqr.backends.protocol import Float32
from mlx_lqr.methods.addition import Addition
from mlx_lqr.methods.baseline import Baseline
from mlx_lqr.methods.method import Option, Paper, StrengthScale
from mlx_lqr.methods.sequential import INCREMENTAL, SequentialMethod, Transport, mean_difference


class PIDAcT(SequentialMethod):
    name = "pid-act"
    title = "PID-AcT"
    papers = (Paper("Nguyen et al.", 2025, "2510.04309"),)
    formula = "`y + s b`, `b` a PID sum over the layers of what `mean-act` fits"
    options = (
        INCREMENTAL,
        Option("kp", float, 1.0, "Proportional gain.", tries=(1.0, 0.5), kept=True),
        Option("ki", float, 0.05, "Integral gain.", tries=(0.05, 0.0), kept=True),
        Option("kd", float, 0.01, "Derivative gain.", tries=(0.01, 0.0), kept=True),
    )
    strengths = StrengthScale("1 does all that was fitted", span=(0.0, 4.0))
    tensors: Mapping[str, str] = {"shift": "Tdm"}
    identity: Mapping[str, float] = {"shift": 0.0}

    def transport(self, options: Mapping[str, Any]) -> Transport:
        total: Any = 0.0
        last: np.ndarray | None = None

        def fit(source: Float32, target: Float32) -> Mapping[str, np.ndarray]:
            nonlocal total, last
            error = mean_difference(source, target)
            change = error - last if last is not None else np.zeros(len(error))
            shift = options["kp"] * error + options["ki"] * total + options["kd"] * change
            total, last = total + error, error
            return {"shift": shift}

        return fit

    def law(self, steering: Baseline, strength: float | Sequence[float]) -> Addition:
        return Addition(steering, strength)
