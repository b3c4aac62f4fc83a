"""What a strength means, and what steers where none is given: centred setpoints and recommended strengths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.backends import BACKENDS, tiny_on
from helpers.command_line import run
from helpers.controllers import mirrored
from helpers.tiny_tokenizers import chatting
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import mlx_lqr
from mlx_lqr import BUDGETS, Calibration, Controller, InputError
from mlx_lqr.analysis.tracking import track
from mlx_lqr.backends.protocol import Model
from mlx_lqr.methods.steering import Steering, combine, law_of, load_steering
from mlx_lqr.runtime.__main__ import main as edge

SETS = [[1, 2, 3], [4, 5, 6], [7, 9]], [[9, 8, 7], [6, 5], [11, 12]]
PROMPT = "Once upon a time,"


def made(model: Model, kind: str, concept: str = "one") -> Steering:
    if kind == "alqr":
        return mlx_lqr.fit(model, *SETS, concept=concept, q=1.0, qf=1.0, layers="all")
    return mlx_lqr.fit_baseline(model, "actadd", *SETS, concept=concept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_centred_strengths_0_and_1_are_the_levels_of_the_sets(backend: str) -> None:
    model = tiny_on(backend, "llama")
    controller = mlx_lqr.fit(model, *SETS, setpoint="centred", layers="all", feedback=1.0)
    levels = [
        np.mean([track(model, prompt, controller, 0.0, steered=False).feature for prompt in prompts], axis=0)
        for prompts in reversed(SETS)
    ]
    for strength, level in enumerate(levels):
        assert track(model, SETS[0][0], controller, float(strength)).setpoint == pytest.approx(
            level, rel=1e-3, abs=1e-4
        )
    paper = mlx_lqr.fit(model, *SETS, layers="all", setpoint="paper", feedback=1.0)
    assert not paper.offset.any()
    assert np.array_equal(paper.gain, controller.gain)


def test_centred_everywhere_a_setpoint_is_chosen() -> None:
    model = tiny_on("mlx", "llama")
    contrast = mlx_lqr.contrast(model, *SETS)
    jacobians = mlx_lqr.linearize(model, SETS[0])
    expected = np.einsum("kd,kd->k", contrast.unit_direction, contrast.mean_negative)[:, None]
    gains = mlx_lqr.solve(jacobians)
    for controller in (
        mlx_lqr.fit(model, *SETS, setpoint="centred", readout="direction", cost="feature", layers="all"),
        mlx_lqr.fit(model, *SETS, setpoint="centred", readout="direction", jacobians=jacobians, layers="all"),
        mlx_lqr.compile(gains, contrast, setpoint="centred", readout="direction"),
        mlx_lqr.adapt(model, contrast, [1, 2], setpoint="centred", readout="direction"),
        mlx_lqr.adapt(model, mlx_lqr.compile(gains, contrast, setpoint="centred", readout="direction"), [1, 2]),
    ):
        assert np.allclose(controller.offset, expected, atol=1e-5)
    paper = mlx_lqr.fit(model, *SETS, concept="one", layers="all", setpoint="paper", readout="direction")
    read = mlx_lqr.fit(model, *SETS, layers="all")
    by_discriminant = np.einsum("kdm,kd->km", read.sensor, contrast.mean_negative)
    assert np.allclose(read.offset, by_discriminant, atol=1e-5)
    joint = Controller.combine(controller, mirrored(replace(paper, direction=controller.direction)))
    assert np.allclose(joint.offset[:, :1], expected, atol=1e-5)
    assert not joint.offset[:, 1].any()
    with pytest.raises(InputError, match="setpoint must be 'paper' or 'centred', not 'middle'"):
        mlx_lqr.fit(model, *SETS, setpoint="middle", layers="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["alqr", "actadd"])
def test_a_recommended_strength_survives_files_and_combination(kind: str, tmp_path: Path) -> None:
    model = tiny_on("mlx", "llama")
    plain = made(model, kind)
    assert plain.strength is None
    other = made(model, kind, "other")
    if isinstance(other, Controller):
        other = mirrored(other)
    tuned: Any = plain.recommending((2.5,))
    for steering in (plain, tuned, combine([tuned, other])):
        steering.save(tmp_path / "file")
        assert load_steering(tmp_path / "file").strength == steering.strength
    joint = combine([other, tuned])
    assert joint.strength == (1.0, 2.5)
    assert [one.strength for one in joint.split()] == [(1.0,), (2.5,)]
    assert combine([plain, other]).strength is None


@pytest.mark.parametrize("kind", ["alqr", "actadd"])
@pytest.mark.parametrize("entry", ["[1.0, 2.0]", "[NaN]", '"much"', "2", "["])
def test_a_damaged_recommendation_is_refused(kind: str, entry: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    made(tiny_on("mlx", "llama"), kind).save(file)
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, metadata={**metadata, "strength": entry})
    with pytest.raises(InputError, match="damaged"):
        load_steering(file)


CALIBRATION = Calibration(
    {"gentle": 1.5, "normal": 2.0, "strong": 3.25}, {"gentle": 0.1, "normal": 0.21, "strong": 0.39}
)


@pytest.mark.parametrize("kind", ["alqr", "actadd"])
def test_a_calibration_survives_files_combination_and_tuning(kind: str, tmp_path: Path) -> None:
    model = tiny_on("mlx", "llama")
    plain = made(model, kind)
    assert plain.calibration == ()
    known = plain.calibrated(CALIBRATION)
    assert (known.strength, known.calibration) == ((2.0,), (CALIBRATION,))
    assert plain.calibrated(CALIBRATION, "strong").strength == (3.25,)
    other = made(model, kind, "other")
    if isinstance(other, Controller):
        other = mirrored(other)
    joint = combine([other, known])
    for steering in (plain, known, known.recommending((4.0,)), joint):
        steering.save(tmp_path / "file")
        loaded = load_steering(tmp_path / "file")
        assert (loaded.strength, loaded.calibration) == (steering.strength, steering.calibration)
    assert known.recommending((4.0,)).calibration == (CALIBRATION,)
    assert joint.calibration == (None, CALIBRATION)
    assert [one.calibration for one in joint.split()] == [(None,), (CALIBRATION,)]
    assert combine([plain, other]).calibration == ()
    with pytest.raises(InputError, match="calibrate each alone"):
        joint.calibrated(CALIBRATION)


def test_strengths_at_budgets_and_in_multiples() -> None:
    model = tiny_on("mlx", "llama")
    plain: Any = made(model, "actadd")
    known, other = plain.calibrated(CALIBRATION, "gentle"), made(model, "actadd", "other")
    assert known.strength_at() == (1.5,)
    assert known.strength_at(times=-2) == (-3.0,)
    assert known.strength_at("strong") == (3.25,)
    assert known.strength_at("strong", 2) == (6.5,)
    assert combine([known, other.recommending((5.0,))]).strength_at(times=2) == (3.0, 10.0)
    for refused, says in (
        (lambda: plain.strength_at(), "one has no recommended strength"),
        (lambda: plain.strength_at("gentle"), "one is not calibrated"),
        (lambda: combine([known, other]).strength_at("gentle"), "other is not calibrated"),
        (lambda: known.strength_at("wild"), "budget must be 'gentle' or 'normal' or 'strong', not 'wild'"),
        (lambda: plain.calibrated(CALIBRATION, "wild"), "budget must be"),
        (lambda: known.strength_at(times=float("nan")), "times must be a finite number"),
    ):
        with pytest.raises(InputError, match=says):
            refused()


def test_gains_for_one_prompt_keep_what_the_file_recommends() -> None:
    model = tiny_on("mlx", "llama")
    known: Any = made(model, "alqr").calibrated(CALIBRATION)
    adapted = mlx_lqr.adapt(model, known, [1, 2])
    assert (adapted.strength, adapted.calibration) == (known.strength, known.calibration)
    assert mlx_lqr.adapt(model, mlx_lqr.contrast(model, *SETS), [1, 2]).calibration == ()


@pytest.mark.parametrize(
    ("strengths", "divergences"),
    [
        ((1.0, 2.0), (0.1, 0.2)),
        ((1.0, 2.0, float("inf")), (0.1, 0.2, 0.4)),
        ((0.0, 2.0, 3.0), (0.1, 0.2, 0.4)),
        ((-1.0, 2.0, 3.0), (0.1, 0.2, 0.4)),
        ((1.0, 3.0, 2.0), (0.1, 0.2, 0.4)),
        ((1.0, 2.0, 3.0), (0.1, 0.2, -0.4)),
        ((1.0, 2.0, 3.0), (0.1, 0.2, float("nan"))),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(strengths: Any, divergences: Any) -> None:
    with pytest.raises(InputError):
        Calibration(dict(zip(BUDGETS, strengths, strict=False)), dict(zip(BUDGETS, divergences, strict=False)))
    ablating = Calibration(*(dict(zip(BUDGETS, numbers, strict=True)) for numbers in ((-1, -1, -2), (0, 0, 1))))
    assert ablating.at("strong") == -2


PAIRS = '"gentle": [1, 0.1], "normal": [2, 0.2]'


@pytest.mark.parametrize("kind", ["alqr", "actadd"])
@pytest.mark.parametrize(
    "entry",
    [
        "[]",
        "[null, null]",
        "2",
        "[[1, 0.1]]",
        "[{}]",
        f"[{{{PAIRS}}}]",
        f'[{{{PAIRS}, "strong": [1.5, 0.4]}}]',
        f'[{{{PAIRS}, "strong": [3, -1]}}]',
        f'[{{{PAIRS}, "strong": [NaN, 0.4]}}]',
        f'[{{{PAIRS}, "strong": [3]}}]',
        f'[{{{PAIRS}, "strong": [3, true]}}]',
        f'[{{{PAIRS}, "strong": [3, 0.4], "wild": [9, 9]}}]',
    ],
)
def test_a_damaged_calibration_is_refused(kind: str, entry: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    made(tiny_on("mlx", "llama"), kind).save(file)
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, metadata={**metadata, "calibration": f'[{{{PAIRS}, "strong": [3, 0.4]}}]'})
    assert load_steering(file).calibration[0] is not None
    save_file(load_file(file), file, metadata={**metadata, "calibration": entry})
    with pytest.raises(InputError, match="damaged"):
        load_steering(file)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["alqr", "actadd"])
def test_python_takes_the_recommended_strength_where_none_is_given(backend: str, kind: str) -> None:
    model = tiny_on(backend, "llama")
    plain = made(model, kind)
    tuned: Any = plain.recommending((4.0,))
    for steering, strength in ((plain, 1.0), (tuned, 4.0)):
        options: mlx_lqr.Options = {"controller": steering, "max_tokens": 12, "temperature": 0}
        expected = [piece.token for piece in mlx_lqr.stream(model, [1, 2], strength=strength, **options)]
        assert [piece.token for piece in mlx_lqr.stream(model, [1, 2], **options)] == expected
        assert law_of(steering).strength == (strength,)
    if isinstance(tuned, Controller):
        record, given = mlx_lqr.Recording(), mlx_lqr.Recording()
        mlx_lqr.generate(model, [1, 2], controller=tuned, max_tokens=3, record=record, temperature=0)
        mlx_lqr.generate(model, [1, 2], controller=tuned, strength=4.0, max_tokens=3, record=given, temperature=0)
        assert np.array_equal(record.feature_error(), given.feature_error(), equal_nan=True)


def test_a_steered_model_of_others_takes_it_too() -> None:
    import mlx.core as mx

    model = tiny_on("mlx", "llama")
    tuned: Any = made(model, "alqr").recommending((4.0,))
    logits = []
    for strength in (None, 4.0, 1.0):
        with mlx_lqr.steer(model.module, tuned, strength):
            logits.append(np.array(model.module(mx.array([[1, 2, 3]]))))
    assert np.array_equal(logits[0], logits[1])
    assert not np.array_equal(logits[0], logits[2])


def test_a_chat_takes_it_and_keeps_what_was_set() -> None:
    model = chatting()
    tuned: Any = made(model, "alqr").recommending((2.5,))
    chat = mlx_lqr.runtime.Chat(model)
    chat.add(tuned)
    assert chat.strengths == {"one": 2.5}
    chat.add(tuned, 4.0)
    assert chat.strengths == {"one": 4.0}
    chat.add(tuned)
    assert chat.strengths == {"one": 2.5}


@pytest.fixture(scope="module")
def tuned(dog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tuned") / "dog.safetensors"
    replace(Controller.load(dog), strength=(3.5,)).save(file)
    return file


def test_commands_take_it(tuned: Path, dog: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = "-p", PROMPT, "-n", "8", "--temperature", "0"
    explicit = json.loads(run("generate", "demo", *greedy, "-c", f"{dog}:3.5", "--json").stdout)
    assert json.loads(run("generate", "demo", *greedy, "-c", tuned, "--json").stdout) == explicit
    assert explicit["concepts"] == {"dog": 3.5}
    assert edge(["demo", *greedy, "-c", str(tuned)]) == 0
    assert capsys.readouterr().out == explicit["text"] + "\n"
    said = run("chat", "demo", "-c", tuned, text=f"/strength\n/add {dog}\n/add {tuned}\n/add {tuned}:2\n").stderr
    assert [line for line in said.splitlines() if line.startswith("Steered")] == [
        f"Steered: dog {strength}." for strength in ("3.5", "1", "3.5", "2")
    ]
    assert "strength   3.5 (recommended)" in run("show", tuned).stdout
    assert json.loads(run("show", tuned, "--json").stdout)["strength"] == [3.5]
    assert "recommended" not in run("show", dog).stdout
