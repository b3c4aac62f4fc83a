"""Tune: the optimum of known functions is found in the budget, the limit is held to, and nothing is measured twice."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.backends import BACKENDS, tiny_on

import mlx_lqr
from mlx_lqr import tasks
from mlx_lqr.backends.protocol import Model
from mlx_lqr.errors import InputError, OverflowingError
from mlx_lqr.methods.alqr import ALQR
from mlx_lqr.methods.steering import law_of
from mlx_lqr.tasks.bootstrap import Metric, exponential_ratio, mean
from mlx_lqr.tasks.concept import bundled_openings
from mlx_lqr.tasks.records import Row
from mlx_lqr.tasks.search import Measurement, Search, next_dose
from mlx_lqr.tasks.steering import Steered
from mlx_lqr.tasks.tuning import DAMAGE

SETS = [[1, 2, 3], [4, 5, 6], [7, 9]], [[9, 8, 7], [6, 5], [11, 12]]
FACTORS = {"place": ["all", "third", "late"], "weight": [1.0, 0.3, 3.0], "centred": [False, True], "cost": ["a", "b"]}


def dose_of(steepness: float, allowed: float) -> float:
    """Where steepness (2 dose)^1.6 is `allowed`."""
    return min(1.0, (allowed / steepness) ** (1 / 1.6) / 2)


def effects(options: Mapping[str, Any]) -> tuple[float, float]:
    """How much of control and of damage the values of FACTORS make of the same dose."""
    control = {"all": 1.0, "third": 1.0, "late": 0.95}[options["place"]] * {1.0: 1, 0.3: 0.7, 3.0: 1.4}[
        options["weight"]
    ]
    damage = {"all": 0.5, "third": 0.3, "late": 0.2}[options["place"]] * {1.0: 1, 0.3: 0.5, 3.0: 3}[options["weight"]]
    return control * (1.1 if options["centred"] else 1), damage * (0.95 if options["cost"] == "b" else 1)


def known_control(options: Mapping[str, Any], dose: float) -> float:
    return 1 - math.exp(-1.5 * effects(options)[0] * dose)


def known_excess(options: Mapping[str, Any], dose: float) -> float:
    return effects(options)[1] * (2 * dose) ** 1.6


@pytest.mark.parametrize("allowed", [0.1, 0.26, 0.5])
@pytest.mark.parametrize(("noise", "regret"), [(0.0, 0.15), (0.02, 0.25)])
def test_the_search_finds_the_optimum_of_known_functions(allowed: float, noise: float, regret: float) -> None:
    """Regret is what is lost of the way from the worst candidate at its best dose to the best one at its best."""
    grid = [dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())]
    reachable = [known_control(options, dose_of(effects(options)[1], allowed)) for options in grid]
    lost = []
    for seed in range(20 if noise else 1):
        random = np.random.default_rng(seed)
        measured: list[tuple[dict[str, Any], float, Measurement]] = []

        def measure(
            options: dict[str, Any], dose: float, measured: Any = measured, random: Any = random
        ) -> Measurement:
            assert 0 < dose <= 1
            assert not any(options == other and dose == tried for other, tried, _ in measured)
            errors = noise * random.standard_normal(2)
            result = Measurement(known_control(options, dose) + errors[0], known_excess(options, dose) + errors[1])
            measured.append((options, dose, result))
            return result

        Search(FACTORS, measure, 16, allowed).run()
        assert len(measured) == 16
        within = [trial for trial in measured if trial[2].excess <= allowed]
        options, dose, _ = max(within, key=lambda trial: trial[2].control)
        lost.append((max(reachable) - known_control(options, dose)) / (max(reachable) - min(reachable)))
    assert np.mean(lost) < regret


def test_doses_close_in_on_the_limit_and_stop_there() -> None:
    for power, steepness in itertools.product((0.8, 1.0, 2.0, 3.0), (0.3, 1.0, 8.0, 200.0)):
        points: list[tuple[float, float]] = [(0.4, steepness * 0.4**power)]
        while (dose := next_dose(points, 1.0)) is not None:
            assert 0 < dose <= 1
            points.append((dose, steepness * dose**power))
            assert len(points) < 12, (power, steepness)
        best = max((excess for _, excess in points if excess <= 1), default=None)
        assert best is not None
        assert best > 0.85 or points[-1][0] == 1 or steepness == 200
    assert next_dose([(0.4, math.inf)], 1.0) == pytest.approx(0.2)
    assert next_dose([(0.4, -0.1)], 1.0) == pytest.approx(0.7)


def test_a_candidate_that_needs_a_far_larger_dose_is_measured_there() -> None:
    """As early layers do: at the best dose of the others it controls less, at the limit more."""
    limits = {"late": 0.2, "early": 0.6}
    measured: list[tuple[float, str]] = []

    def measure(options: dict[str, Any], dose: float) -> Measurement:
        used = dose / limits[options["place"]]
        control = {"late": 0.5, "early": 0.8}[options["place"]] * used
        if used <= 1:
            measured.append((control, options["place"]))
        return Measurement(control, 0.4 * used**2)

    Search({"place": ["late", "early"]}, measure, 3, 0.4, first=0.2).run()
    assert max(measured)[1] == "early"


def test_a_budget_of_one_and_nothing_within_the_limit() -> None:
    calls: list[float] = []

    def hopeless(options: dict[str, Any], dose: float) -> Measurement:
        calls.append(dose)
        return Measurement(0.9, math.inf)

    Search(FACTORS, hopeless, 1, 0.3).run()
    assert len(calls) == 1
    Search(FACTORS, hopeless, 40, 0.3).run()
    assert len(calls) <= 41


class Known:
    """A part of known functions of a controller's options and strength, one row a sample."""

    name = "known"

    def __init__(self, overflow_above: float = math.inf) -> None:
        self.overflow_above = overflow_above
        self.measured = 0

    def __len__(self) -> int:
        return 8

    def settings(self, model: Model) -> Row:
        return {}

    def rows(self, steered: Steered, indices: range) -> list[Row]:
        self.measured += 1
        if steered.strength > self.overflow_above:
            raise OverflowingError("the activations overflow: lower the strength")
        if steered.steering is None:
            return [{"control": 0.0, "nats": 2.0} for _ in indices]
        return [{"control": self.control(steered), "nats": 2.0 + self.log_ratio(steered)} for _ in indices]

    def control(self, steered: Steered) -> float:
        controller = self.controller(steered)
        return 1 - math.exp(-0.3 * steered.strength * (1 if controller.offset.any() else 1.2))

    def log_ratio(self, steered: Steered) -> float:
        controller = self.controller(steered)
        places = len(controller.active_layers) / controller.num_layers
        return 0.06 * places * controller.weights.q**0.5 * steered.strength**1.7

    def controller(self, steered: Steered) -> mlx_lqr.Controller:
        assert steered.steering is not None
        assert isinstance(steered.steering.controller, mlx_lqr.Controller)
        return steered.steering.controller

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        groups = [row["index"] for row in rows]
        nats = np.array([(row["nats"], 1.0) for row in rows], np.float64).reshape(-1, 2)
        return {
            "control": mean([row["control"] for row in rows], groups),
            "perplexity": Metric(nats, np.asarray(groups, np.int64), exponential_ratio),
        }


class Flat(Known):
    """Which no strength changes."""

    def control(self, steered: Steered) -> float:
        return 0.5

    def log_ratio(self, steered: Steered) -> float:
        return 0.0


class Unwanted(Known):
    name = "unwanted"

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        return {"kl": mean([row["control"] for row in rows], [row["index"] for row in rows])}


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Model:
    return tiny_on(request.param, "llama")


@pytest.fixture(scope="module")
def space(model: Model) -> tasks.Space:
    contrast, jacobians = mlx_lqr.contrast(model, *SETS), mlx_lqr.linearize(model, SETS[0])
    return tasks.alqr_space(model, contrast, jacobians, concept="one")


def task_of(*parts: Any) -> tasks.Task:
    return tasks.Task("known", parts, "control", "known control")


def test_tune_recommends_the_optimum_of_a_synthetic_task(model: Model, space: tasks.Space, tmp_path: Path) -> None:
    unwanted = Unwanted()
    tuned = tasks.tune(model, task_of(Known(), unwanted), space, limit=1.3, folder=tmp_path / "run")
    assert unwanted.measured == 0
    assert len(tuned.trials) <= 16
    assert tuned.best is not None
    assert tuned.best.within
    assert tuned.best.relative <= 1.3
    for trial in tuned.trials:
        assert trial.within == (trial.relative <= 1.3)
        assert trial.relative == pytest.approx(trial.damage.value / math.exp(2.0))
    # the best is at one layer of three, with the paper's setpoint and the least of q that were offered
    strength = (math.log(1.3) / (0.06 / 3 * 1.0**0.5)) ** (1 / 1.7)
    optimum = 1 - math.exp(-0.3 * 1.2 * min(4.0, strength))
    assert tuned.best.control.value > 0.93 * optimum
    assert tuned.best.options["setpoint"] == "paper"
    controller = tuned.steering
    assert isinstance(controller, mlx_lqr.Controller)
    assert controller.strength == (tuned.best.strength,)
    assert controller.weights.q == tuned.best.options["q"]
    assert controller.concepts == ("one",)
    # what is recommended does what its trial says
    steering = tasks.NamedSteering("again", controller)
    (again,) = tasks.evaluate(model, task_of(Known()), steering, controller.strength).results()
    assert again.metrics["control"] == tuned.best.control
    lines = [json.loads(line) for line in (tmp_path / "run/trials.jsonl").read_text().splitlines()]
    assert [(line["options"], line["strength"]) for line in lines] == [
        (dict(trial.options), trial.strength) for trial in tuned.trials
    ]
    for line in lines:
        assert {"control", "damage", "relative", "within", "limit", "metrics"} <= line.keys()


def test_a_candidate_is_what_fit_makes_of_its_options(model: Model, space: tasks.Space) -> None:
    start = {name: values[0] for name, values in space.factors.items()}
    places = {"last third": [2], "middle third": [1]}
    assert model.num_layers == 3
    assert places.keys() <= set(space.factors["layers"])
    thirds: list[dict[str, Any]] = [{"layers": "last third", "q": 0.3}, {"layers": "middle third"}]
    for change in ({}, *thirds, {"setpoint": "paper", "qf/q": 10.0}, {"cost": "adaptive"}):
        options = {**start, **change}
        controller = space.candidate(options).fit()
        given = {name: options[name] for name in ("layers", "q", "cost", "setpoint")}
        given["qf"] = options["q"] * options["qf/q"]
        given["layers"] = places.get(given["layers"], given["layers"])
        expected = mlx_lqr.fit(model, *SETS, concept="one", jacobian_prompts=3, **given)
        assert isinstance(controller, mlx_lqr.Controller)
        for name in ("direction", "gain", "setpoint", "offset"):
            assert np.allclose(getattr(controller, name), getattr(expected, name), rtol=1e-3, atol=1e-5), (change, name)
        assert (controller.weights, controller.cost) == (expected.weights, options["cost"])


@pytest.mark.parametrize(
    ("strengths", "first"),
    [((0.0, 4.0), 0.7), ((0.0, -4.0), -0.7), ((0.5, 1.5), 0.7), ((2.0, 6.0), 3.6), ((1.0, 1.0), 1.0)],
)
def test_the_search_begins_where_fit_suggests_to_look(
    model: Model, strengths: tuple[float, float], first: float
) -> None:
    """Or, where the strengths to search do not have that, a little below the middle."""
    assert ALQR.strengths.suggested == 0.7
    contrast, jacobians = mlx_lqr.contrast(model, *SETS), mlx_lqr.linearize(model, SETS[0])
    space = tasks.alqr_space(model, contrast, jacobians, concept="one", strengths=strengths)
    mild, strong = strengths
    assert mild + space.first_dose * (strong - mild) == pytest.approx(first)
    tuned = tasks.tune(model, task_of(Flat()), space, evaluations=1)
    assert tuned.trials[0].strength == pytest.approx(first)


def test_an_interrupted_search_goes_on_and_measures_nothing_again(
    model: Model, space: tasks.Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tasks.tune(model, task_of(Known()), space, folder=tmp_path / "whole")
    known, honest = Known(), Known.rows

    def stopping(self: Known, *arguments: Any) -> list[Row]:
        if self.measured == 5:
            raise KeyboardInterrupt
        return honest(self, *arguments)

    monkeypatch.setattr(Known, "rows", stopping)
    with pytest.raises(KeyboardInterrupt):
        tasks.tune(model, task_of(known), space, folder=tmp_path / "broken")
    monkeypatch.setattr(Known, "rows", honest)
    resumed = tasks.tune(model, task_of(known), space, folder=tmp_path / "broken")
    assert resumed.trials == expected.trials
    assert known.measured == len(expected.trials) + 1  # with the unsteered model
    trials = (tmp_path / "broken/trials.jsonl").read_bytes()
    assert trials == (tmp_path / "whole/trials.jsonl").read_bytes()
    monkeypatch.setattr(Known, "rows", None)
    monkeypatch.setattr("mlx_lqr.methods.alqr.solve_controller", None)  # nor is anything fitted again
    assert tasks.tune(model, task_of(known), space, folder=tmp_path / "broken").trials == expected.trials
    assert (tmp_path / "broken/trials.jsonl").read_bytes() == trials


def test_other_prompts_in_the_same_folder_are_other_candidates(model: Model, tmp_path: Path) -> None:
    jacobians = mlx_lqr.linearize(model, SETS[0])
    directions = []
    for sets in (SETS, SETS[::-1]):
        space = tasks.alqr_space(model, mlx_lqr.contrast(model, *sets), jacobians, concept="one")
        tuned = tasks.tune(model, task_of(Known()), space, limit=2.0, evaluations=1, folder=tmp_path)
        assert isinstance(tuned.steering, mlx_lqr.Controller)
        directions.append(tuned.steering.direction)
    assert np.allclose(directions[0], -directions[1], atol=1e-5)
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 2


def test_overflow_is_a_trial_beyond_the_limit(model: Model, space: tasks.Space) -> None:
    tuned = tasks.tune(model, task_of(Known(overflow_above=1.5)), space)
    over = [trial for trial in tuned.trials if trial.strength > 1.5]
    assert over
    assert not any(trial.within for trial in over)
    assert all(math.isinf(trial.damage.value) for trial in over)
    assert tuned.best is not None
    assert 1 < tuned.best.strength <= 1.5


def test_texts_that_go_round_in_circles_are_beyond_the_limit_though_their_perplexity_is_low(
    model: Model, space: tasks.Space
) -> None:
    class Circling(Known):
        def log_ratio(self, steered: Steered) -> float:
            return -0.1 * steered.strength

        def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
            shares = [0.02 if row["control"] < 0.3 else 0.5 for row in rows]
            return {**super().metrics(rows), "repetition": mean(shares, [row["index"] for row in rows])}

    tuned = tasks.tune(model, task_of(Circling()), space)
    circling = [trial for trial in tuned.trials if trial.control.value >= 0.3]
    assert circling
    assert all(trial.repeats and not trial.within and trial.relative < 1 for trial in circling)
    assert all(trial.within and not trial.repeats for trial in tuned.trials if trial.control.value < 0.3)
    assert tuned.best is not None
    assert 0.2 < tuned.best.control.value < 0.3
    allowed = tasks.tune(model, task_of(Circling()), space, damage="repetition", limit=0.6)
    assert allowed.best is not None
    assert allowed.best.control.value > 0.3  # whoever names the metric sets its limit


def test_nothing_within_the_limit_recommends_nothing(model: Model, space: tasks.Space) -> None:
    tuned = tasks.tune(model, task_of(Known(overflow_above=0.0)), space, evaluations=6)
    assert tuned.best is tuned.steering is None
    assert len(tuned.trials) == 6


def test_limits_are_relative_to_the_unsteered_model() -> None:
    assert DAMAGE["perplexity"].relative(9.0, 6.0) == 1.5
    assert DAMAGE["perplexity"].excess(1.5) == pytest.approx(math.log(1.5))
    assert DAMAGE["kl"].relative(0.7, 0.0) == 0.7
    assert DAMAGE["capability"].relative(0.5, 0.7) == pytest.approx(0.2)
    assert DAMAGE["distinct_2"].relative(0.9, 0.95) == pytest.approx(0.05)


def test_mistakes_in_tune(model: Model, space: tasks.Space) -> None:
    for options, says in (
        ({"limit": 1.0}, "above 1"),
        ({"limit": math.nan}, "above 1"),
        ({"control": "charm"}, "does not measure charm"),
        ({"damage": "kl"}, "does not measure kl"),
        ({"damage": "control"}, "no measure of damage"),
        ({"evaluations": 0}, "at least 1"),
    ):
        with pytest.raises(InputError, match=says):
            tasks.tune(model, task_of(Known()), space, **options)  # type: ignore[arg-type]
    other = tiny_on("mlx", "llama", seed=1)
    contrast, jacobians = mlx_lqr.contrast(model, *SETS), mlx_lqr.linearize(model, SETS[0])
    with pytest.raises(InputError, match="not of tiny"):
        tasks.alqr_space(other, contrast, jacobians)


@pytest.mark.parametrize("method", mlx_lqr.METHODS)
def test_every_baseline_has_a_space_whose_candidates_can_be_fitted(method: Any) -> None:
    model = tiny_on("mlx", "llama", num_hidden_layers=6)
    space = tasks.baseline_space(model, method, *SETS, concept="one")
    start = {name: values[0] for name, values in space.factors.items()}
    others = [{**start, name: value} for name, values in space.factors.items() for value in values[1:]]
    assert others
    fitted = [space.candidate(options).fit() for options in (start, *others)]
    steerings = [tasks.NamedSteering("one", one) for one in fitted]
    assert len({json.dumps(steering.settings) for steering in steerings}) > len(fitted) / 2  # options do arrive
    assert {one.method for one in fitted} == {method}
    mild, strong = space.candidate(start).strengths
    law = law_of(fitted[0], strong)
    assert not np.allclose(model.logits([1, 2, 3], law=law), model.logits([1, 2, 3]))
    assert mild != strong


def test_a_baseline_is_tuned_with_the_same_budget() -> None:
    class Alike(Known):
        def control(self, steered: Steered) -> float:
            return 0.1 * steered.strength

        def log_ratio(self, steered: Steered) -> float:
            return 0.01 * steered.strength**2

    model = tiny_on("mlx", "llama")
    space = tasks.baseline_space(model, "actadd", *SETS)
    tuned = tasks.tune(model, task_of(Alike()), space, evaluations=8)
    assert len(tuned.trials) <= 8
    assert tuned.best is not None
    assert 4.5 < tuned.best.strength <= math.sqrt(math.log(1.3) / 0.01)
    assert isinstance(tuned.steering, mlx_lqr.Baseline)
    assert tuned.steering.strength == (tuned.best.strength,)


def test_tuning_has_openings_of_its_own() -> None:
    tuning, evaluation = bundled_openings("tuning"), bundled_openings()
    assert len(set(tuning)) == len(evaluation) == 16
    assert not set(tuning) & set(evaluation)
    assert all(text == text.strip() and text.isascii() for text in tuning)
