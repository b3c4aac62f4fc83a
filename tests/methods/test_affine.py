"""What an affine law says of itself is what a call to it does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.backends import BACKENDS, tiny_on
from helpers.controllers import NEGATIVE, POSITIVE, controller_for

import mlx_lqr
from mlx_lqr.backends.protocol import AffineLaw, Array
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.methods.recording import RecordedFeedback
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.steering import law_of

AFFINE = {"ablation", "actadd", "alqr", "iti", "mean-act", "pca", "pid-act", "proportional"}


def by_hand(law: AffineLaw, layer: int, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """y + (target - z R - y S) G' for rows z and y (n, d)"""
    affines = law.affine()
    assert affines is not None
    one = affines.get(layer)
    if one is None:
        return y
    error = one.target - (z @ one.read_input if one.read_input is not None else 0)
    return y + (error - (y @ one.read_output if one.read_output is not None else 0)) @ one.gain.T


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_law_that_gives_its_numbers_is_what_they_say(method: str, random: np.random.Generator) -> None:
    model = tiny_on(BACKENDS[0], "llama")
    positive = POSITIVE * 2 if method == "pca" else POSITIVE
    negative = NEGATIVE * 2 if method == "pca" else NEGATIVE
    law: Any = law_of(mlx_lqr.fit_baseline(model, method, positive, negative), 1.5)
    assert (law.affine() is not None) == (method in AFFINE)
    z, y = random.standard_normal((2, 3, model.hidden_size)).astype(np.float32)
    for strength in (1.5, -0.5, 0.0) if method in AFFINE else ():
        law.strength = strength
        for layer in range(model.num_layers):
            called = law(layer, z, y) if layer in law.layers else y
            assert np.allclose(by_hand(law, layer, z, y), called, atol=1e-5), (strength, layer)


def test_concepts_that_are_off_change_the_gains_of_the_others(random: np.random.Generator) -> None:
    model = tiny_on(BACKENDS[0], "llama")
    law = LinearFeedback(mlx_lqr.Controller.combine(*(controller_for(model, concept) for concept in "ab")), 1.0)
    z, y = random.standard_normal((2, 3, model.hidden_size)).astype(np.float32)
    for strength in ((1.0, 2.0), (0.0, 2.0), (-1.0, 0.0)):
        law.strength = strength
        for layer in law.layers:
            assert np.allclose(by_hand(law, layer, z, y), law(layer, z, y), atol=1e-5)


def test_the_numbers_are_the_same_object_until_something_is_set() -> None:
    law = law_of(controller_for(tiny_on(BACKENDS[0], "llama")), 1.0)
    placed = law.to(np.asarray, lambda c, a, b: c + a @ b)
    before = placed.affine()
    assert placed.affine() is before
    law.strength = 2.0
    assert placed.affine() is not before


def test_a_law_that_does_more_when_it_is_called_has_to_be_called() -> None:
    class Halved(LinearFeedback):
        def _error(self, layer: int, z: Array) -> Array:
            return 0.5 * super()._error(layer, z)

    controller = controller_for(tiny_on(BACKENDS[0], "llama"))
    assert LinearFeedback(controller).affine() is not None
    assert Halved(controller).affine() is None
    assert RecordedFeedback(controller).affine() is None
