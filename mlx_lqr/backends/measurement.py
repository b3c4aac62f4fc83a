"""What was measured of a model that is on no list: how right its derivatives are, and what follows from that."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from mlx_lqr.errors import InputError

EXACT, USABLE = 1e-2, 0.2
"""Relative errors: up to the former nothing is said, beyond the latter the model is refused."""


@dataclass(frozen=True)
class Measurement:
    """Relative errors, and what follows for how the model is run."""

    steps: float
    jacobian: float
    chain: float
    differences: bool
    """Whether the blocks have no derivative that is right, so that differences stand in for it."""
    merges: bool
    """Whether sequences of different lengths can share a batch."""

    @property
    def is_exact(self) -> bool:
        """Whether there is nothing to say about it."""
        return max(self.steps, self.jacobian, self.chain) <= EXACT

    def check(self, family: str) -> None:
        """Warn of what is not exact.

        Raises:
            InputError: it is too far off.
        """
        for error, what in (
            (self.steps, "its logits token by token differ from those of one pass"),
            (self.jacobian, "the derivatives of its blocks differ from their own response"),
            (self.chain, "the product of its blocks' Jacobians differs from the model's own response"),
        ):
            if not error <= USABLE:
                raise InputError(
                    f"models of the type {family!r} cannot be steered: {what} by {_percent(error)}, at most "
                    f"{_percent(USABLE)} is usable: use another model"
                )
        if self.steps > EXACT:
            _note(f"models of the type {family!r} give other logits token by token, by {_percent(self.steps)}")
        if max(self.chain, self.jacobian) > EXACT:
            _note(
                f"in models of the type {family!r} blocks hand on more than their output: a controller's prediction "
                f"is off by {_percent(max(self.chain, self.jacobian))}, and its gains are not quite optimal"
            )


def _percent(error: float) -> str:
    return f"{100 * error:.3g} %"


def _note(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=4)
