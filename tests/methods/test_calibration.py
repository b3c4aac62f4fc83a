"""Strengths by budget: the divergence against the definition, and a search that keeps to what it is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from helpers.backends import BACKENDS, tiny_on

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.protocol import Model
from mlx_lqr.lqr.prompts import tokenise
from mlx_lqr.lqr.strength import BUDGETS
from mlx_lqr.methods import calibration
from mlx_lqr.methods.calibration import LENGTH, OPENINGS, QUESTIONS, SENTENCES, START, calibrate, response
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.steering import Steering, combine, law_of

POSITIVE, NEGATIVE = [[1, 2, 3], [4, 5], [9, 30, 7]], [[6, 7], [8], [12, 44]]


def fitted(model: Model, method: str = "alqr") -> Steering:
    return mlx_lqr.fit_baseline(model, method, POSITIVE, NEGATIVE)


def divergence_by_hand(model: Model, steering: Steering, strength: float) -> float:
    """KL(steered || unsteered) of sentences and answers, one position of one text at a time."""
    law, chat = law_of(steering, strength), model.tokenizer.has_chat_template
    asked = [model.tokenizer.chat([{"role": "user", "content": text}]) for text in QUESTIONS] if chat else OPENINGS
    texts = [tokenise(model, text)[: START + LENGTH] for text in SENTENCES]
    continued = [(own[:START], own[START:]) for own in texts if own[START:]]
    sentences = len(continued)
    for message in asked:
        prompt = tokenise(model, message)
        answer: list[int] = []
        while len(answer) < LENGTH:
            answer.append(int(model.logits([*prompt, *answer]).argmax()))
            if answer[-1] in model.tokenizer.end_tokens:
                answer.pop()
                break
        continued.append((prompt, answer))
    kinds = []
    for kind in filter(None, (continued[:sentences], continued[sentences:])):
        found = []
        for before, after in kind:
            steered = model.logits_along([(before, after)], law=law)[0].astype(np.float64)
            for i, logits in enumerate(steered):
                reference = model.logits([*before, *after[:i]]).astype(np.float64)
                p, q = (np.exp(one - one.max()) / np.exp(one - one.max()).sum() for one in (logits, reference))
                found.append(float((p * np.log(p / q)).sum()))
        kinds.append(np.mean(found))
    return float(np.mean(kinds))


@pytest.mark.parametrize("backend", BACKENDS)
def test_divergence_is_that_of_every_position_of_sentences_and_answers(backend: str) -> None:
    model = tiny_on(backend, "llama")
    steering = fitted(model)
    found = calibrate(model, steering, budgets={**BUDGETS, "normal": 0.3})
    for budget in BUDGETS:
        by_hand = divergence_by_hand(model, steering, found.strength[budget])
        assert found.divergence[budget] == pytest.approx(by_hand, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_is_calibrated_on_one_scale(method: str) -> None:
    """The strength for a harder budget is further from no steering, and no divergence is far beyond its budget."""
    model = tiny_on("mlx", "llama")
    budgets = {"gentle": 1e-4, "normal": 1e-3, "strong": 1e-2}
    found = calibrate(model, fitted(model, method), budgets=budgets)
    mild, strong = METHODS[method].strengths.span
    doses = [(found.strength[name] - mild) / (strong - mild) for name in budgets]
    assert doses == sorted(doses)
    assert 0 < doses[0] <= doses[-1] <= 1
    for name, budget in budgets.items():
        smallest = found.strength[name] == min(found.strength.values(), key=abs)
        assert found.divergence[name] <= 1.1 * budget or smallest


def test_steering_keeps_its_calibration_and_recommends_the_normal_strength() -> None:
    model = tiny_on("mlx", "llama")
    steering = fitted(model)
    found = calibrate(model, steering)
    assert steering.calibrated(found).strength == (found.strength["normal"],)
    assert steering.calibrated(found, "gentle").strength == (found.strength["gentle"],)


def test_what_cannot_be_calibrated_is_refused() -> None:
    model = tiny_on("mlx", "llama")
    steering = fitted(model)
    both = combine([steering, mlx_lqr.fit_baseline(model, "alqr", [[1], [2, 3]], [[40, 41], [9]], concept="other")])
    with pytest.raises(InputError, match="each alone"):
        calibrate(model, both)
    with pytest.raises(InputError, match="above zero"):
        calibrate(model, steering, budgets={**BUDGETS, "gentle": 0.0})
    with pytest.raises(InputError, match="fitted on"):
        calibrate(tiny_on("mlx", "gemma"), steering)
    added = fitted(model, "actadd")
    assert isinstance(added, mlx_lqr.Baseline)
    idle = replace(added, tensors={"shift": np.zeros((model.num_layers, model.hidden_size, 1), np.float32)})
    with pytest.raises(InputError, match="changes nothing"):
        calibrate(model, idle)


@pytest.mark.parametrize(
    ("divergence", "reachable"),
    [
        (lambda s: 0.05 * s**2, True),
        (lambda s: 0.02 + 0.03 * s**3, True),
        (lambda s: 1 - math.exp(-s), True),
        (lambda s: 0.3 * s**2 if s < 1.6 else math.inf, True),
        (lambda s: 0.001 * s, False),
        (lambda s: 0.15 * min(s, 1.0), False),
        (lambda s: 9.0 + s, False),
    ],
)
def test_the_search_finds_what_there_is(divergence: Callable[[float], float], reachable: bool) -> None:
    search = calibration.Search(divergence, 0.0, 6.0, first=1.0)
    strengths = {budget: search.reach(budget) for budget in (0.1, 0.2, 0.4)}
    for budget, strength in strengths.items():
        if reachable:
            assert divergence(strength) == pytest.approx(budget, rel=0.11)
        else:
            least = calibration.LEAST
            assert (
                strength == pytest.approx(6.0 if divergence(6.0) <= 1.1 * budget else least)
                or divergence(6.0) > 1.1 * budget
                or strength < 1
            )
            assert divergence(strength) <= 1.1 * budget or strength == pytest.approx(least)
    assert len(search.known) <= 3 * calibration.PASSES


def test_an_angle_is_searched_downwards() -> None:
    search = calibration.Search(lambda angle: (110 - angle) / 100, 110.0, 5.0, first=90.0)
    assert search.reach(0.4) == pytest.approx(70, abs=5)


@pytest.mark.slow
def test_the_real_model_answers_to_a_direction(smollm2: Model) -> None:
    positive, negative = mlx_lqr.bundled_prompts("dog")
    steering = mlx_lqr.fit_baseline(smollm2, "actadd", positive[:20], negative[:20], layers=[24])
    assert response(smollm2, steering, 0.0, positive, negative) == 0
    assert response(smollm2, steering, 2.0, positive[20:], negative[20:]) > 0.1
    assert response(smollm2, steering, -2.0, positive[20:], negative[20:]) < -0.1
