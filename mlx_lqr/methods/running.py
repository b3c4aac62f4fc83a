"""Fitted steering on a model: its law, and what only an A-LQR controller can do (adapt, be recorded or tracked)."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lqr.backends.capabilities import HEAD_RECORDER, require
from mlx_lqr.backends.protocol import Runner
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.strength import default_strength
from mlx_lqr.methods.baseline import Steering
from mlx_lqr.methods.laws import AdjustableLaw, RecordedFeedback, Recording, law_of


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
        law = law_of(steering, strength)
        if law.site == "attention":
            require(model, HEAD_RECORDER, "steer inside attention, as iti does")
        return law
    strength = default_strength(steering) if strength is None else strength
    return RecordedFeedback(only_controller(steering, "recorded"), strength, record)


def adapts(steering: Steering | None, adaptive: bool | None = None) -> bool:
    """Whether gains are recomputed for each prompt: as `adaptive` says, or, where it is None, as it was fitted."""
    return adaptive if adaptive is not None else isinstance(steering, Controller) and steering.cost == "adaptive"


def only_controller(steering: Steering, what: str) -> Controller:
    """`steering`, if it is an A-LQR controller.

    Raises:
        InputError: it is of another method, which cannot be `what` ("tracked", "certified", ...).
    """
    if isinstance(steering, Controller):
        return steering
    raise InputError(f"steering of the method {steering.method} cannot be {what}: this needs an A-LQR controller")
