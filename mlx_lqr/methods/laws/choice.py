"""Which law a fitted steering is run by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.strength import default_strength
from mlx_lqr.methods.baseline import MethodName, Steering
from mlx_lqr.methods.laws.adjustable import AdjustableLaw
from mlx_lqr.methods.laws.baselines import (
    Ablation,
    AdaptiveRotation,
    Addition,
    AttentionAddition,
    BaselineLaw,
    Proportional,
    Rotation,
    Transport,
)
from mlx_lqr.methods.laws.feedback import LinearFeedback
from mlx_lqr.methods.laws.gradient_flow import GradientFlow
from mlx_lqr.methods.laws.spid import SPID, CarryingSPID

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
