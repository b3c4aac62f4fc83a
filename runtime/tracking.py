"""How closely the feature followed its setpoint in an answer: the answer is run again, steered as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from mlx_lqr.backends.protocol import AddProduct, Array, Float32, Law, Renew, Runner, Site
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.tracking import Tracking
from mlx_lqr.methods.alqr import LinearFeedback


@dataclass(frozen=True)
class TrackedAnswer:
    """The last token of an answer as it was decoded, and the same tokens without steering."""

    controller: Controller
    strength: tuple[float, ...]
    """The strength of each concept in force at that token."""
    steered: Tracking
    unsteered: Tracking
    gain: Float32
    """(T, d, m): G_k in force at that token. It differs from the controller's own where gains were recomputed for the
    prompt, or where a concept is at strength 0"""

    @property
    def error(self) -> Float32:
        """alpha_k, how far the feature is below where the push ends: (T, m)"""
        return self.controller.ends_at(self.strength) - self.steered.feature

    @property
    def push(self) -> Float32:
        """|u_k|, of all concepts together: (T,)"""
        return np.linalg.norm(np.einsum("kdm,km->kd", self.gain, self.error), axis=1)


def track_answer(
    model: Runner,
    prompt: Sequence[int],
    answer: Sequence[int],
    controller: Controller,
    strengths: Sequence[tuple[float, ...]],
    *,
    law: LinearFeedback | None = None,
    rolling: bool = False,
) -> TrackedAnswer:
    """Run an answer again, steered as when it was decoded, and compare feature and setpoint at its last token.

    Args:
        model: what `load` returned.
        prompt, answer: token ids. If the answer is empty, the prompt's last token is compared.
        controller: the controller that steered.
        strengths: the strengths at the prompt's last token, and then at each token of the answer.
        law: the law that steered, where its gains are not the controller's own (recomputed for this prompt).
        rolling: the answer was decoded in a context that rolls.

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
            # A rolling context drops tokens one by one; dropping several at once would give other numbers.
            for part in [[token] for token in tokens] if rolling else [tokens]:
                decoder.fill([part], steered=True)
        law.strength = strengths[-1]
        gain = law.gain
        decoder.step([steps[-1][0]])
        runs.append(Tracking.at(controller, watch.residual(), strengths[-1]))
    law.strength = before
    return TrackedAnswer(controller, strengths[-1], runs[0], runs[1], gain)


class _Watch:
    """Wraps a law, or none, and keeps the residual stream at the input of every block in the last step."""

    def __init__(self, law: Law | None, num_layers: int) -> None:
        self.layers: Sequence[int] = range(num_layers)
        self.site: Site = "block"
        self.replayable = False
        self._law = law
        self._passed: dict[int, Array] = {}  # shared with the copies that `place` makes

    def to(
        self, array: Callable[[np.ndarray], Array], add_product: AddProduct, *, renew: Renew | None = None
    ) -> _Watch:
        placed = copy(self)
        placed._law = self._law.to(array, add_product, renew=renew) if self._law is not None else None
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
