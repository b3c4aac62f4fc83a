"""How closely the feature follows its setpoint, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from mlx_lqr.backends.protocol import AddProduct, Array, Float32, Law, Model, Renew, Site
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.prompts import Prompt, tokenise
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.methods.law import check_strength


@dataclass(frozen=True)
class Tracking:
    """Feature and setpoint at the last token of a prompt, both in the residual stream's own units; (T, m) each."""

    feature: Float32
    """beta_k = v_k . z_k at the input of block k"""
    setpoint: Float32
    """beta*_k = offset_k + strength mu_k; at strength 0 nothing is steered towards it"""


def as_strength(controller: Controller, feature: Float32, concept: int = 0) -> Float32:
    """The strengths (T,) at which each layer's setpoint is this feature (T,): (feature - offset_k) / mu_k."""
    mu = controller.setpoint[:, concept]
    return np.divide(feature - controller.offset[:, concept], mu, out=np.zeros_like(mu), where=mu > 0)


@dataclass(frozen=True)
class TrackedAnswer:
    """The last token of an answer as it was decoded, and the same tokens without steering."""

    controller: Controller
    strength: tuple[float, ...]
    """The strength of each concept in force at that token."""
    steered: Tracking
    unsteered: Tracking
    gain: Float32
    """(T, d, m): G_k in force at that token, which is not the controller's own where it was made for the prompt or a
    concept is at strength 0"""

    @property
    def error(self) -> Float32:
        """alpha_k = setpoint - feature: (T, m)"""
        return self.steered.setpoint - self.steered.feature

    @property
    def push(self) -> Float32:
        """|u_k|, of all concepts together: (T,)"""
        return np.linalg.norm(np.einsum("kdm,km->kd", self.gain, self.error), axis=1)


def track(
    model: Model,
    prompt: Prompt,
    controller: Controller,
    strength: float | Sequence[float],
    *,
    steered: bool = True,
) -> Tracking:
    """Run a prompt under a controller (or, not `steered`, without it) and compare the feature with its setpoint.

    Raises:
        InputError: an unusable prompt or strength, or a controller of another model.
    """
    controller.check_model(model)
    law = LinearFeedback(controller, strength) if steered else None
    residual = model.residuals([tokenise(model, prompt)], law=law, steer_all=controller.positions == "all")[0, :-1]
    return _tracking(controller, residual, strength)


def track_answer(
    model: Model,
    prompt: Sequence[int],
    answer: Sequence[int],
    controller: Controller,
    strengths: Sequence[tuple[float, ...]],
    *,
    law: LinearFeedback | None = None,
    rolling: bool = False,
) -> TrackedAnswer:
    """Run an answer again, steered as it was when it was decoded, and compare feature and setpoint at its last token.

    Args:
        model: what `load` returned.
        prompt, answer: token ids. Without an answer, the prompt's last token is looked at.
        controller: the controller that steered.
        strengths: those under which the prompt's last token was run, and then each of the answer's.
        law: what steered, where its gains are not the controller's own (made for the very prompt).
        rolling: decoded in a context that rolls.

    Raises:
        InputError: a controller of another model.
    """
    controller.check_model(model)
    law = law if law is not None else LinearFeedback(controller, strengths[0])
    before, gain = law.strength, law.gain
    runs = []
    for steering in (law, None):
        decoder = model.decoder(LinearFeedback(controller, strengths[0]) if steering is law else None, rolling=rolling)
        decoder.fill([prompt[:-1]], steered=controller.positions == "all")
        decoder.law = watch = _Watch(steering, model.num_layers)
        steps = list(zip([prompt[-1], *answer], strengths, strict=True))
        for strength, same in groupby(steps[:-1], key=lambda step: step[1]):
            law.strength = strength
            tokens = [token for token, _ in same]
            # A context that rolls drops tokens one by one; dropping several at once would be another computation.
            for part in [[token] for token in tokens] if rolling else [tokens]:
                decoder.fill([part], steered=True)
        law.strength = strengths[-1]
        gain = law.gain
        decoder.step([steps[-1][0]])
        runs.append(_tracking(controller, watch.residual(), strengths[-1]))
    law.strength = before
    return TrackedAnswer(controller, strengths[-1], runs[0], runs[1], gain)


class _Watch:
    """A law, or none, that keeps what passes it: the residual stream at the input of every block in the last step."""

    def __init__(self, law: Law | None, num_layers: int) -> None:
        self.layers: Sequence[int] = range(num_layers)
        self.site: Site = "block"
        self.replayable = False
        self._law = law
        self._passed: dict[int, Array] = {}  # shared with those placed from it

    def place(
        self, array: Callable[[np.ndarray], Array], add_product: AddProduct, *, renew: Renew | None = None
    ) -> _Watch:
        placed = copy(self)
        placed._law = self._law.place(array, add_product, renew=renew) if self._law is not None else None
        return placed

    @property
    def acts(self) -> bool:
        return True

    def aim(self) -> None:
        if self._law is not None:
            self._law.aim()

    def __call__(self, layer: int, z: Array, output: Array) -> Array:
        self._passed[layer] = z
        return self._law(layer, z, output) if self._law is not None and layer in self._law.layers else output

    def residual(self) -> Float32:
        """z_0..z_{T-1}: (T, d)"""
        return np.array([self._passed[layer][0, -1].tolist() for layer in self.layers], np.float32)


def _tracking(controller: Controller, residual: Float32, strength: float | Sequence[float]) -> Tracking:
    """What the residual stream z_0..z_{T-1} (T, d) at one token says."""
    strengths = np.asarray(check_strength(strength, len(controller.concepts)), np.float32)
    return Tracking(
        np.einsum("kdm,kd->km", controller.direction, residual),
        controller.offset + controller.setpoint * strengths,
    )
