"""Whatever can steer: a controller, or what any other method has fitted, under one interface.

A file becomes steering by `load_steering`, several steerings one by `combine`, and steering at a strength a law by
`law_of`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mlx_lqr.backends.protocol import Runner
from mlx_lqr.concepts import bundled_concepts
from mlx_lqr.errors import InputError
from mlx_lqr.files.control_vectors import is_gguf
from mlx_lqr.files.tensors import read_format
from mlx_lqr.lqr.controller import Controller, Fitted, Positions
from mlx_lqr.lqr.strength import Budget, Calibration, Recommending, Strengths, default_strength
from mlx_lqr.methods.baseline import Baseline
from mlx_lqr.methods.control_vector import read_control_vector
from mlx_lqr.methods.law import AdjustableLaw
from mlx_lqr.methods.registry import METHODS

if TYPE_CHECKING:
    from typing_extensions import Self


class Steering(Fitted, Recommending, Protocol):
    """What was fitted by one of `METHODS` on a model of T blocks of width d."""

    @property
    def method(self) -> str: ...
    @property
    def positions(self) -> Positions: ...
    @property
    def active_layers(self) -> tuple[int, ...]: ...
    @property
    def adaptive(self) -> bool:
        """Whether it is to be recomputed for each prompt."""

    @property
    def checked(self) -> bool:
        """Whether it knows the region in which its linear model was found good (`analysis.linearity`)."""

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """All that the law is made of, by name."""

    @property
    def prompt_counts(self) -> tuple[tuple[int, int], ...]:
        """Positive and negative prompts of each concept."""

    @property
    def library_version(self) -> str: ...

    def check_model(self, model: Runner) -> None:
        """Raise `InputError` unless this was fitted on `model`."""

    def recommending(self, strength: Strengths) -> Self:
        """The same with a recommended strength for each concept."""

    def calibrated(self, calibration: Calibration, budget: Budget = "normal") -> Self:
        """The same, of one concept, with its strength for each budget, one of which it recommends."""

    def strength_at(self, budget: Budget | None = None, times: float = 1.0) -> Strengths:
        """For each concept so many times the strength for a budget; without a budget, of the recommended strength."""

    def split(self) -> Sequence[Self]:
        """One for each concept alone; `combine` undoes it."""

    def save(self, path: str | PathLike[str], *, force: bool = False) -> None:
        """Write it to a file, which `load_steering` reads."""


def law_of(steering: Steering, strength: float | Sequence[float] | None = None) -> AdjustableLaw:
    """The law of a steering at a strength; by default the recommended one, or 1 where there is none."""
    strength = default_strength(steering) if strength is None else strength
    return METHODS[steering.method].law(steering, strength)


def combine(steerings: Sequence[Steering]) -> Steering:
    """Several as one: controllers jointly (see `Controller.combine`), methods that only add vectors by adding.

    Raises:
        InputError: of different models, positions or methods, a concept twice, or a method of one concept alone.
    """
    if len(steerings) == 1:
        return steerings[0]
    methods = sorted({steering.method for steering in steerings})
    if len(methods) > 1:
        raise InputError(f"steering of the methods {', '.join(methods)} cannot be combined: use one file at a time")
    combined: Any = METHODS[methods[0]].combine(steerings)
    return combined


def in_conversation(steering: Steering) -> Steering:
    """What steers the answers of a conversation after the first: see `Controller.in_conversation`.

    Other methods have no feedback to take more of, and stay as they are.
    """
    return steering.in_conversation() if isinstance(steering, Controller) else steering


def load_steering(path: str | PathLike[str], model: str = "MODEL") -> Steering:
    """Read a controller, the steering of any other method, or a control vector, whichever the file holds.

    Args:
        path: the file, of safetensors, or of GGUF for a control vector of llama.cpp or repeng.
        model: what the model is called where a command to fit one is named.

    Raises:
        InputError: see `Controller.load`, `Baseline.load` and `read_control_vectors`; or the name of a bundled concept
            instead of a file.
    """
    name = os.fspath(path)
    if name in bundled_concepts() and not os.path.exists(name):
        file = f"{name}.safetensors"
        if os.path.exists(file):
            raise InputError(f"{name} is a bundled concept and no file: did you mean {file}?")
        raise InputError(
            f"{name} is a bundled concept and no file: mlx-lqr fit {model} --concept {name} -o {file} makes one, then "
            f"steer with {file}"
        )
    if is_gguf(path):
        return read_control_vector(path)
    return Baseline.load(path) if read_format(path).startswith("mlx-lqr baseline") else Controller.load(path)


def only_controller(steering: Steering, what: str) -> Controller:
    """`steering`, if it is a controller.

    Raises:
        InputError: it is of another method, of which this cannot be done.
    """
    if isinstance(steering, Controller):
        return steering
    raise InputError(f"steering of the method {steering.method} cannot be {what}: this needs an A-LQR controller")
