"""Strength 0 is not steered: the same numbers as without a controller, for every method, on every way to an answer."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.backends import BACKENDS, tiny_on
from helpers.tiny_tokenizers import chatting

import mlx_lqr
from mlx_lqr import Controller, InputError
from mlx_lqr.analysis import certify, linearity
from mlx_lqr.analysis.rollout import roll_out
from mlx_lqr.analysis.tracking import track
from mlx_lqr.backends.protocol import Model
from mlx_lqr.commands.chat_state import steering_line
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.steering import Steering, combine, law_of
from mlx_lqr.runtime import Chat, Options, batch_stream
from mlx_lqr.runtime.monitor import largest_excess
from mlx_lqr.runtime.tracking import track_answer
from mlx_lqr.tasks.steering import NamedSteering, Steered, check_strengths

SETS = {
    "one": ([[1, 2, 3], [4, 5, 6], [7, 9]], [[9, 8, 7], [6, 5], [11, 12]]),
    "two": ([[21, 20], [5, 30], [31, 32]], [[40, 41], [13, 5], [50, 2]]),
    "three": ([[17, 3], [8, 33]], [[44, 1], [25, 26]]),
}
PROMPT = [5, 17, 3, 42, 8]
ALQR = ("centred", "paper", "feature", "adaptive", "all positions")


def alqr(model: Model, kind: str = "centred", concept: str = "one") -> Controller:
    options: dict[str, Any] = {
        "centred": {},
        "paper": {"setpoint": "paper"},
        "feature": {"cost": "feature"},
        "adaptive": {"cost": "adaptive"},
        "all positions": {"positions": "all"},
    }[kind]
    return mlx_lqr.fit(model, *SETS[concept], concept=concept, layers="all", **options)


def made(model: Model, kind: str) -> Steering:
    if kind in ALQR:
        return alqr(model, kind)
    return mlx_lqr.fit_baseline(model, kind, *SETS["one"], concept="one", layers=[1, 2] if kind == "iti" else None)  # type: ignore[arg-type]


def answer(model: Model, **options: Any) -> list[int | None]:
    return [piece.token for piece in mlx_lqr.stream(model, PROMPT, max_tokens=8, temperature=0, **options)]


@pytest.mark.parametrize("kind", [*ALQR, *METHODS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_changed_by_any_method(backend: str, kind: str) -> None:
    model = tiny_on(backend, "llama")
    steering = made(model, kind)
    law, steer_all = law_of(steering, 0), steering.positions == "all"
    assert not law.acts
    assert np.array_equal(model.logits(PROMPT, law=law, steer_all=steer_all), model.logits(PROMPT))
    assert np.array_equal(model.residuals([PROMPT], law=law, steer_all=steer_all), model.residuals([PROMPT]))
    pairs = [(PROMPT, [1, 2, 3])]
    steered, unsteered = model.logits_along(pairs, law=law, steer_all=steer_all), model.logits_along(pairs)
    assert np.array_equal(steered[0], unsteered[0])
    assert answer(model, controller=steering, strength=-0.0) == answer(model)
    assert not np.array_equal(
        model.logits(PROMPT, law=law_of(steering, 100.0), steer_all=steer_all), model.logits(PROMPT)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_and_tasks(backend: str) -> None:
    model = tiny_on(backend, "llama")
    controller = alqr(model)
    prompts = [PROMPT, [4], [7, 8]]
    runs = [
        [(i, piece.token) for i, piece in batch_stream(model, prompts, max_tokens=6, temperature=0, **options)]
        for options in ({}, {"controller": controller, "strength": 0.0})
    ]
    assert runs[0] == runs[1]
    for strength, shares in ((-0.0, (1.0,)), (2.0, (0.0,))):
        steered = Steered(model, NamedSteering("a", controller, shares), strength)
        assert np.array_equal(steered.logits_along([(PROMPT, [1])])[0], model.logits_along([(PROMPT, [1])])[0])
        greedy: Options = {"max_tokens": 6, "temperature": 0}
        assert steered.texts(prompts, greedy) == Steered(model).texts(prompts, greedy)
    assert str(check_strengths(model, NamedSteering("a", controller), [-0.0, 0.0, 1.0])) == "[0.0, 1.0]"


def test_steering_in_place() -> None:
    import mlx.core as mx

    for backend in BACKENDS:
        model = tiny_on(backend, "llama")
        tokens = mx.array([PROMPT]) if backend == "mlx" else torch.tensor([PROMPT])

        def logits(model: Any = model, tokens: Any = tokens, backend: str = backend) -> np.ndarray:
            output = model.module(tokens)
            return np.array(output) if backend == "mlx" else output.logits.detach().numpy()

        expected = logits()
        for kind in ("centred", "all positions", "angular", "proportional"):
            with mlx_lqr.steer(model.module, made(model, kind), 0):
                assert np.array_equal(logits(), expected)


@pytest.mark.parametrize("kind", ["centred", "adaptive", "all positions", "actadd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_of_several_is_as_if_it_were_not_there(backend: str, kind: str) -> None:
    model = tiny_on(backend, "llama")
    if kind == "actadd":
        parts: list[Any] = [mlx_lqr.fit_baseline(model, "actadd", *SETS[name], concept=name) for name in SETS]
    else:
        parts = [alqr(model, kind, name) for name in SETS]
    strengths = [1.5, -2.0, 2.5]
    steer_all = parts[0].positions == "all"
    for off in range(1, len(parts)):
        for gone in itertools.combinations(range(len(parts)), off):
            kept = [i for i in range(len(parts)) if i not in gone]
            own = [strengths[i] for i in kept]
            some = [0.0 if i in gone else strength for i, strength in enumerate(strengths)]
            expected = model.logits(PROMPT, law=law_of(combine([parts[i] for i in kept]), own), steer_all=steer_all)
            logits = model.logits(PROMPT, law=law_of(combine(parts), some), steer_all=steer_all)
            assert logits == pytest.approx(expected, abs=2e-5)
            alone = answer(model, controller=combine([parts[i] for i in kept]), strength=own)
            assert answer(model, controller=combine(parts), strength=some) == alone
    off_alone = model.logits(PROMPT, law=law_of(combine(parts), [0, 0, 0]), steer_all=steer_all)
    assert np.array_equal(off_alone, model.logits(PROMPT))


@pytest.mark.parametrize("spelling", ["one", "two"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_off_and_on_again_within_an_answer(backend: str, spelling: str) -> None:
    """Long enough for MLX's compiled step. Each token is that of a decoder which has had the strength of now placed
    anew, and does not replay what was recorded."""
    model = tiny_on(backend, "llama")
    names = ["one"] if spelling == "one" else ["one", "two"]
    controller = combine([alqr(model, concept=name) for name in names])
    plan = [2.0] * 40 + [0.0] * 6 + [3.0] * 4 + [0.0] * 3 + [-2.0] * 3
    strengths = [(s, 1.5)[: len(names)] for s in plan] + [(0.0,) * len(names)] * 3
    law = law_of(controller, strengths[0])
    decoder, other = model.decoder(law), model.decoder()
    for one in (decoder, other):
        one.fill([PROMPT], steered=False)
    token = 5
    for strength in strengths:
        if strength != law.strength:
            decoder.law.strength = strength
        fresh = law_of(controller, strength)
        fresh.replayable = False
        other.law = fresh if any(strength) else None
        logits, expected = (np.array(one.step([token]).tolist()[0]) for one in (decoder, other))
        assert logits == pytest.approx(expected, abs=1e-4)
        token = int(expected.argmax())


def test_a_recorded_step_is_not_replayed_once_the_law_acts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph holds, rehearsed without one: the operations of the moment in which it was recorded."""
    recorded: list[bool] = []

    class Graph:
        def __init__(self, run: Any, tokens: Any, length: int) -> None:
            self._run, self._acts = run, law.acts
            recorded.append(law.acts)

        def replay(self, tokens: Any, length: int) -> Any:
            assert law.acts == self._acts
            return self._run(tokens, torch.tensor([length]))

    model = tiny_on("torch", "llama")
    monkeypatch.setattr("mlx_lqr.backends.torch.decoder._Graph", Graph)
    law = law_of(alqr(model), 2.0)
    decoder, plain = model.decoder(law), model.decoder()
    decoder._records_graphs = True
    for strength in (2.0, 3.0, 0.0, -0.0, 1.0):
        law.strength = strength
        plain.law = law_of(alqr(model), strength) if strength else None
        assert torch.allclose(decoder.step([5]), plain.step([5]), atol=1e-5)
    assert recorded == [True, False, True]


@pytest.mark.parametrize("kd", [0.0, 0.3])
def test_the_state_of_spid_begins_anew_after_a_pause(kd: float) -> None:
    model = tiny_on("mlx", "llama")
    spid = mlx_lqr.fit_baseline(model, "spid", *SETS["one"], numbers={"kd": kd})
    law = law_of(spid, 2.0)
    decoder, expected = model.decoder(law), model.decoder()
    for one in (decoder, expected):
        one.fill([PROMPT], steered=False)
    for token, strength in ((5, 2.0), (6, 0.0), (7, 3.0)):
        decoder.law.strength = strength
        expected.law = law_of(spid, strength) if strength else None
        logits = [np.array(one.step([token])) for one in (decoder, expected)]
        assert np.array_equal(*logits)


def test_a_chat_at_strength_0_and_back() -> None:
    model = chatting()
    chat = Chat(model, options={"max_tokens": 10, "temperature": 0})
    controller = mlx_lqr.fit(model, [[1, 2, 3], [4, 5]], [[6, 7], [8]], layers="all", concept="a")
    unsteered = [piece.token for piece in chat.answer("hello")]
    chat.restart()
    chat.add(controller, 0)
    assert steering_line(chat) == "Not steered: a 0."
    assert [piece.token for piece in chat.answer("hello")] == unsteered
    assert not chat.track().push.any()
    chat.restart()
    chat.set_strength(3)
    pieces = chat.answer("hello")
    for _ in range(3):
        next(pieces)
    chat.set_strength(0)
    next(pieces)
    chat.set_strength(2)
    list(pieces)
    assert chat._turn is not None
    assert {strength for (strength,) in chat._turn.strengths} == {3.0, 0.0, 2.0}
    tracked = chat.track()
    again = track_answer(model, chat._turn.prompt, chat._turn.tokens, controller, chat._turn.strengths)
    assert np.array_equal(tracked.push, again.push)
    assert tracked.push.any()


def test_what_is_recorded_and_tracked() -> None:
    model = tiny_on("mlx", "llama")
    controller = combine([alqr(model, concept=name) for name in ("one", "two")])
    record = mlx_lqr.Recording()
    tokens = answer(model, controller=controller, strength=[0, 0], record=record)
    assert tokens == answer(model)
    assert not record.push().any()
    assert np.isnan(record.feature_error()).all()
    half = mlx_lqr.Recording()
    answer(model, controller=controller, strength=[0, 2], record=half)
    alone = mlx_lqr.Recording()
    answer(model, controller=alqr(model, concept="two"), strength=2, record=alone)
    assert half.push() == pytest.approx(alone.push(), rel=1e-4)
    assert np.isnan(half.feature_error()[..., 0]).all()
    assert half.feature_error()[..., 1:] == pytest.approx(alone.feature_error(), rel=1e-3, abs=1e-5)
    assert isinstance(controller, Controller)
    region = np.full_like(controller.setpoint, 1e9)
    narrow = np.where([True, False], 1e-9, region)  # of the one that is off, which it cannot leave
    known = replace(controller, checked_error=narrow, checked_push=narrow.astype(np.float32))
    excess = largest_excess(known, *half.answer(known, len(PROMPT), 8))
    assert excess is not None
    assert excess.ratio < 1
    unsteered = track(model, PROMPT, controller, 0.0, steered=False)
    assert np.array_equal(track(model, PROMPT, controller, 0.0).feature, unsteered.feature)


def test_the_linear_analysis_has_nothing_to_look_at() -> None:
    model = tiny_on("mlx", "llama")
    controller = alqr(model)
    run = roll_out(model, PROMPT, controller, [0.0, 1.0])
    assert np.array_equal(run.steered[0], run.unsteered[0])
    assert not run.push[0].any()
    with pytest.raises(InputError, match="strength 0 is not steered"):
        certify(model, controller, [PROMPT], [[1, 2]], strengths=(0.0, 1.0))
    with pytest.raises(InputError, match="strength 0 is not steered"):
        linearity(model, [PROMPT, [1, 2]], controller, strengths=(0.0, 1.0))
