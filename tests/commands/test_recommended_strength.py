"""What a file recommends, on the command line: alone, in multiples, and by budget, in every command that takes -c."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
from helpers.command_line import refused, run, small, steering_commands, written
from helpers.controllers import controller_for

import mlx_lqr
from mlx_lqr import Calibration, InputError
from mlx_lqr.backends.protocol import Model
from mlx_lqr.commands.sweep import sweep
from mlx_lqr.commands.values import parse_strengths
from mlx_lqr.runtime.__main__ import main as minimal
from mlx_lqr.runtime.arguments import Asked, ControllerChoice, Times, parse_controller

A = Calibration({"gentle": 1.5, "normal": 2.0, "strong": 3.0}, {"gentle": 0.1, "normal": 0.2, "strong": 0.35})
B = Calibration({"gentle": 4.0, "normal": 6.0, "strong": 8.0}, {"gentle": 0.1, "normal": 0.2, "strong": 0.4})
FORMS = {"a": 2.0, "a:1.5x": 3.0, "a:-1x": -2.0, "a:gentle": 1.5, "a:strong": 3.0, "a:0.5": 0.5, "a:2:gentle": 1.5}
"""What is written after -c, and the strength that it comes to."""
COMMANDS = steering_commands()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """Loaded by every command. The current folder has calibrated files of the concepts a and b, and one that is not."""
    monkeypatch.chdir(tmp_path)
    model = small(monkeypatch)
    monkeypatch.setattr(importlib.import_module("mlx_lqr.runtime.__main__"), "load", lambda *_, **__: model)
    plain, other = controller_for(model), controller_for(model, "b")
    for name in ("plain", "another"):
        plain.save(name)
    for name in ("a", "a:2"):
        plain.calibrated(A).save(name)
    other.calibrated(B).save("b")
    plain.recommending((5.0,)).save("tuned")
    Path("prompts.txt").write_text("One sentence.\nAnd another.\n")
    return model


def generated(*arguments: str) -> Any:
    result = run("generate", "tiny", "-p", "Hi", "-n", "1", "--seed", "1", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["concepts"]


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_to_its_strength_in_every_command(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    number = FORMS[form]
    assert generated("-c", form) == {"a": number}
    said = run("chat", "tiny", "-c", form, "-n", "1", text="/strength\n/off\n" + f"/add {form}\n").stderr
    assert said.count(f"Steered: a {number:g}.") == 2
    steering, numbers = sweep([parse_controller(form)], None, None)
    assert steering is not None
    assert [steering.strength(one) for one in numbers] == ([[1], [2], [4]] if form == "a" else [[number]])
    greedy = "tiny", "-p", "Hi", "-n", "4", "--temperature", "0"
    assert minimal([*greedy, "-c", form]) == minimal([*greedy, "-c", f"plain:{number:g}"])
    texts = capsys.readouterr().out.split("\n")
    assert texts[0] == texts[1]


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(("path", "parameter"), COMMANDS, ids=lambda value: str(value))
def test_a_budget_is_the_strength_of_files_without_one(path: tuple[str, ...], parameter: click.Parameter) -> None:
    command, *arguments = written(path, "a")
    found: Any = mlx_lqr.commands.main.commands[command]
    while isinstance(found, click.Group):
        found, arguments = found.commands[arguments[0]], arguments[1:]
    context = found.make_context("it", [*arguments, "-c", "b:2", "--budget", "strong"])
    assert context.params["controllers"] == (ControllerChoice("a", ("strong",)), ControllerChoice("b", (2.0,)))
    assert "budget" not in context.params


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("controller", "options", "says"),
    [
        ("plain:2x", [], "a has no recommended strength: fit it again, or give a number"),
        ("plain:gentle", [], "a is not calibrated, so that it has no gentle strength: fit it again, or give a number"),
        ("tuned:strong", [], "a is not calibrated, so that it has no strong strength: fit it again, or give a number"),
        ("plain", ["--budget", "normal"], "a is not calibrated, so that it has no normal strength: fit it again, or"),
        ("a:1", ["--budget", "normal"], "--budget and -c a:1 both say how strongly to steer: leave one of the two out"),
        ("a:infx", [], "strength must be a finite number, not 'infx'"),
        ("a:x", [], "strength must be a number, a multiple such as 1.5x, or gentle, normal, strong, not 'x'"),
    ],
)
def test_a_mistake_is_the_same_line_in_every_command(
    controller: str, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, _ in COMMANDS:
        assert refused(*written(path, controller), *options, text="Hi").startswith(f"Error: {says}")
    assert minimal(["no-such-model", "-p", "x", "-c", controller, *options]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"Error: {says}")


@pytest.mark.usefixtures("model")
def test_a_budget_needs_something_to_steer_with(capsys: pytest.CaptureFixture[str]) -> None:
    says = "--budget says how strongly each -c FILE steers: add -c FILE"
    for command in (("generate", "tiny", "-p", "Hi"), ("chat", "tiny"), ("eval", "chat", "tiny", "-o", "out")):
        assert refused(*command, "--budget", "gentle") == f"Error: {says}"
    assert minimal(["tiny", "-p", "Hi", "--budget", "gentle"]) == 2
    assert capsys.readouterr().err == f"Error: {says}\n"
    assert minimal(["tiny", "-p", "Hi", "-c", "a", "--budget", "wild"]) == 2


@pytest.mark.usefixtures("model")
def test_a_file_without_a_recommendation_is_noted_once(capsys: pytest.CaptureFixture[str]) -> None:
    note = "Note: plain recommends no strength, so 1 is used: fit it again, or write -c FILE:STRENGTH"
    result = run("generate", "tiny", "-p", "Hi", "-n", "1", "--seed", "1", "-c", "plain", "--json")
    assert json.loads(result.stdout)["concepts"] == {"a": 1.0}
    assert result.stderr.count("Note: ") == result.stderr.count(note) == 1
    assert run("chat", "tiny", "-c", "plain", text="/quit\n").stderr.count(note) == 1
    assert minimal(["tiny", "-p", "Hi", "-n", "1", "--seed", "1", "-c", "another"]) == 0
    assert capsys.readouterr().err.count(note.replace("plain", "another")) == 1
    assert "Note: " not in run("generate", "tiny", "-p", "Hi", "-n", "1", "--seed", "1", "-c", "plain:1").stderr
    assert "Note: " not in run("generate", "tiny", "-p", "Hi", "-n", "1", "--seed", "1", "-c", "tuned").stderr


@pytest.mark.usefixtures("model")
def test_several_files_each_have_their_own() -> None:
    assert generated("-c", "a", "-c", "b:0.5x") == {"a": 2.0, "b": 3.0}
    assert generated("-c", "a", "-c", "b:-1", "--budget", "gentle") == {"a": 1.5, "b": -1.0}
    said = run("chat", "tiny", "-c", "a", "-c", "b", text="/strength gentle\n/strength b 2x\n/strength 0.5x\n").stderr
    assert [line for line in said.splitlines() if line.startswith("Steered")] == [
        f"Steered: {steered}." for steered in ("a 1.5, b 4", "a 1.5, b 12", "a 1, b 3")
    ]
    said = run("chat", "tiny", "-c", "tuned", "-c", "b", text="/strength gentle\n").stderr
    assert "a is not calibrated" in said
    assert "Steered" not in said  # and not one of the two
    assert "no controller is loaded" in run("chat", "tiny", text="/strength 2x\n").stderr


def effective(*texts: str, strengths: str | None = None, shares: list[float] | None = None) -> list[list[float]]:
    """The strength of each concept, at each strength that is run."""
    asked: list[Asked] | None = parse_strengths(strengths) if strengths is not None else None
    steering, numbers = sweep([parse_controller(text) for text in texts], asked, shares)
    assert steering is not None
    return [steering.strength(number) for number in numbers]


@pytest.mark.usefixtures("model")
def test_sweeps_take_multiples_and_budgets() -> None:
    assert parse_strengths("-1x,2,strong") == [Times(-1), 2.0, "strong"]
    assert effective("a") == effective("a", strengths="0.5x,1x,2x") == [[1], [2], [4]]
    assert effective("plain") == [[0.35], [0.7], [1.4]]  # a half, once and twice what its method suggests
    assert effective("a", strengths="gentle,2,2x") == [[1.5], [2], [4]]
    assert effective("a", "b") == [[1, 3], [2, 6], [4, 12]]
    assert effective("a", "b", shares=[1, -0.5], strengths="1x,2x") == [[2, -3], [4, -6]]
    assert effective("a", "b", strengths="gentle") == effective("a:gentle", "b:gentle") == [[1.5, 4]]
    assert effective("a:1x", "b:-1") == [[2, -1]]
    assert effective("plain", "b") == [[0.35, 0.35], [0.7, 0.7], [1.4, 1.4]]
    for strengths, says in (
        ("1x,2", "numbers alone, or multiples alone"),
        ("gentle,strong", "numbers alone, or multiples alone"),
        ("1x,lots", "or gentle, normal, strong, not 'lots' (write --strengths 1,2,3 or 0.5x,1x,2x)"),
    ):
        with pytest.raises(InputError, match=re.escape(says)):
            effective("a", "b", strengths=strengths)
    with pytest.raises(InputError, match="a has no recommended strength"):
        effective("plain", "b", strengths="1x,2x")


@pytest.mark.usefixtures("model")
def test_certify_and_compare_run_at_them() -> None:
    def numbers(*arguments: str) -> Any:
        result = run("certify", "tiny", "--prompts", "prompts.txt", "--json", *arguments)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["strengths"]

    assert numbers("-c", "a:strong") == numbers("-c", "plain:3") == [3.0]
    assert numbers("-c", "a", "--strengths", "0.5x,gentle") == [1.0, 1.5]
    task = "compare", "concept", "tiny", "--words", "x", "-o", "out"
    assert "equally many strengths (a 3, b 2)" in refused(*task, "-c", "a", "-c", "b:gentle,1x")
    assert "different strengths" in refused(*task, "-c", "a:normal,1x")  # which are the same


@pytest.mark.usefixtures("model")
def test_show_prints_each_budget() -> None:
    shown = run("show", "a").stdout
    assert "strength   2 (recommended)" in shown
    assert "budgets    gentle 1.5 (0.1 nats), normal 2 (0.2 nats), strong 3 (0.35 nats)" in shown
    fields = json.loads(run("show", "a", "--json").stdout)
    assert fields["calibration"] == [{"strength": dict(A.strength), "divergence": dict(A.divergence)}]
    assert json.loads(run("show", "plain", "--json").stdout)["calibration"] == [None]
    assert "budgets" not in run("show", "plain").stdout
    mlx_lqr.Controller.combine(*map(mlx_lqr.Controller.load, ("tuned", "b"))).save("both")
    assert "budgets    b: gentle 4 (0.1 nats)" in run("show", "both").stdout


def test_fit_recommends_the_strength_for_a_budget(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recommended(model: Any, steering: Any, budget: Any, prompts: Any, progress: Any) -> Any:
        asked.append(budget)
        return steering.calibrated(A, budget), []

    monkeypatch.setattr(importlib.import_module("mlx_lqr.commands.fit"), "recommended", recommended)
    fit = ("fit", "tiny", "--positive", "prompts.txt", "--negative", "other.txt", "--layers", "1", "-o", "out")
    Path("other.txt").write_text("Something else.\nNot that.\n")
    wrote, command = run(*fit).stdout.splitlines()
    assert "It recommends strength 2; out:1.5x is stronger, out:0.5x milder." in wrote
    assert command.endswith("-c out")
    assert mlx_lqr.load_steering("out").strength == (2.0,)
    assert run(*fit, "--budget", "strong").exit_code == 0
    assert mlx_lqr.load_steering("out").strength == (3.0,)
    assert asked == ["normal", "strong"]
    assert run(*fit, "--no-calibration").stdout.endswith("-c out:0.7\n")
    assert mlx_lqr.load_steering("out").strength is None
    assert asked == ["normal", "strong"]
    assert "leave one of the two out" in refused(*fit, "--no-calibration", "--budget", "strong")
