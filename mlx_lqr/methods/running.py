"""Fitted steering on the model that it was fitted on: its law, and whether gains are recomputed for each prompt."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lqr.backends.protocol import Runner
from mlx_lqr.lqr.strength import default_strength
from mlx_lqr.methods.law import AdjustableLaw
from mlx_lqr.methods.recording import RecordedFeedback, Recording
from mlx_lqr.methods.steering import Steering, law_of, only_controller


def law_on(
    model: Runner, steering: Steering, strength: float | Sequence[float] | None = None, record: Recording | None = None
) -> AdjustableLaw:
    """The law of a controller, or of the steering of any other method, for the model that it was fitted on.

    Args:
        strength: one number for all concepts, or one for each; by default the recommended one, or 1.
        record: where to keep alpha_k and |u_k| of every layer and token; by default they are not kept.

    Raises:
        InputError: steering of another model, or a record of a method other than A-LQR.
    """
    steering.check_model(model)
    if record is None:
        return law_of(steering, strength)
    strength = default_strength(steering) if strength is None else strength
    return RecordedFeedback(only_controller(steering, "recorded"), strength, record)


def adapts(steering: Steering | None, adaptive: bool | None = None) -> bool:
    """Whether gains are recomputed for each prompt: as `adaptive` says, or, where it is None, as it was fitted."""
    return adaptive if adaptive is not None else steering is not None and steering.adaptive
