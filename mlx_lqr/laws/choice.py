"""Which law a fitted steering is run by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlx_lqr.baseline import MethodName, Steering
from mlx_lqr.controller import Controller
from mlx_lqr.laws.adjustable import AdjustableLaw
from mlx_lqr.laws.baselines import Ablation, AdaptiveRotation, Addition, BaselineLaw, Proportional, Rotation, Transport
from mlx_lqr.laws.feedback import LinearFeedback
from mlx_lqr.laws.spid import SPID, CarryingSPID

_LAWS: Mapping[MethodName, type[BaselineLaw]] = {
    "actadd": Addition,
    "proportional": Proportional,
    "ablation": Ablation,
    "spid": SPID,
    "mean-act": Addition,
    "linear-act": Transport,
    "pid-act": Addition,
    "angular": Rotation,
    "adaptive-angular": AdaptiveRotation,
}


def law_of(steering: Steering, strength: float | Sequence[float] = 1.0) -> AdjustableLaw:
    """The law of a controller, or of the steering of any other method, at a strength."""
    if isinstance(steering, Controller):
        return LinearFeedback(steering, strength)
    return (CarryingSPID if steering.carries else _LAWS[steering.method])(steering, strength)
