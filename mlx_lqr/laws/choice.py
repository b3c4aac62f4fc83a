"""Which law a fitted steering is run by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlx_lqr.baseline import MethodName, Steering
from mlx_lqr.controller import Controller
from mlx_lqr.laws.adjustable import AdjustableLaw
from mlx_lqr.laws.baselines import (
    Ablation,
    AdaptiveRotation,
    Addition,
    AttentionAddition,
    BaselineLaw,
    Proportional,
    Rotation,
    Transport,
)
from mlx_lqr.laws.feedback import LinearFeedback
from mlx_lqr.laws.gradient_flow import GradientFlow
from mlx_lqr.laws.spid import SPID, CarryingSPID
from mlx_lqr.strength import default_strength

_LAWS: Mapping[MethodName, type[BaselineLaw]] = {
    "actadd": Addition,
    "proportional": Proportional,
    "ablation": Ablation,
    "spid": SPID,
    "mean-act": Addition,
    "linear-act": Transport,
    "pid-act": Addition,
    "iti": AttentionAddition,
    "odesteer": GradientFlow,
    "angular": Rotation,
    "adaptive-angular": AdaptiveRotation,
}


def law_of(steering: Steering, strength: float | Sequence[float] | None = None) -> AdjustableLaw:
    """The law of a controller, or of the steering of any other method, at a strength; by default the recommended one,
    or 1 where there is none."""
    strength = default_strength(steering) if strength is None else strength
    if isinstance(steering, Controller):
        return LinearFeedback(steering, strength)
    return (CarryingSPID if steering.carries else _LAWS[steering.method])(steering, strength)
