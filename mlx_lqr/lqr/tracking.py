"""Feature and setpoint: where the residual stream is along a controller's directions, and where it should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_lqr.backends.protocol import Float32
from mlx_lqr.lqr.controller import Controller


@dataclass(frozen=True)
class Tracking:
    """Feature and setpoint at one token, in the residual stream's units; (T, m) each."""

    feature: Float32
    """beta_k = W_k' z_k at the input of block k, W_k the controller's sensor"""
    setpoint: Float32
    """beta*_k = offset_k + strength mu_k; at strength 0 nothing is steered towards it"""

    @classmethod
    def at(cls, controller: Controller, residual: Float32, strength: Sequence[float]) -> Tracking:
        """Of the residual stream z_0..z_{T-1} (T, d) at one token, for one strength per concept (m,)."""
        return cls(
            np.einsum("kdm,kd->km", controller.sensor, residual),
            controller.setpoint_at(strength),
        )


def as_strength(controller: Controller, feature: Float32, concept: int = 0) -> Float32:
    """The strength (T,) at which each layer's setpoint equals this feature (T,): (feature - offset_k) / mu_k."""
    slope = controller.magnitude[:, concept]
    return np.divide(feature - controller.offset[:, concept], slope, out=np.zeros_like(slope), where=slope > 0)
