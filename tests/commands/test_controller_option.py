"""-c FILE[:STRENGTH] has one meaning: one parser reads it for every command, and no other option changes the number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import refused, run, small, steering_commands, written
from helpers.controllers import controller_for
from helpers.tiny_tokenizers import chatting

from mlx_lqr.commands.sweep import sweep
from mlx_lqr.commands.values import ControllerType
from mlx_lqr.errors import InputError
from mlx_lqr.runtime.__main__ import main as minimal
from mlx_lqr.runtime.arguments import ControllerChoice, parse_controller
from mlx_lqr.tasks.registry import TASKS


def test_one_parser_serves_every_command() -> None:
    commands = steering_commands()
    assert len(commands) == 5 + (len(TASKS) + 1) + len(TASKS)  # eval has lm-eval too
    for path, parameter in commands:
        assert isinstance(parameter.type, ControllerType)
        assert parameter.multiple
        assert parameter.type.several_strengths == (path[0] == "compare")
        assert parameter.type.convert("a:1.5", parameter, None) == ControllerChoice("a", (1.5,))


@pytest.mark.parametrize(
    ("controller", "says"),
    [
        (
            "dog.safetensors:lots",
            "strength must be a number, a multiple such as 1.5x, or gentle, normal, strong, not 'lots' (write -c "
            "FILE:STRENGTH)",
        ),
        ("dog.safetensors:nan", "strength must be a finite number, not 'nan' (write -c FILE:STRENGTH)"),
        ("dog.safetensors:1,2", "one strength here, not '1,2': write -c FILE:STRENGTH"),
    ],
)
def test_a_mistake_is_the_same_line_everywhere(
    controller: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for path, _ in steering_commands():
        if path[0] != "compare" or "," not in controller:
            assert refused(*written(path, controller)) == f"Error: {says}"
    assert minimal(["no-such-model", "-p", "x", "-c", controller]) == 2
    assert capsys.readouterr().err == f"Error: {says}\n"


def test_the_file_and_its_strength_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_controller("dog.safetensors") == ControllerChoice("dog.safetensors")
    assert parse_controller("dog.safetensors:-2") == ControllerChoice("dog.safetensors", (-2.0,))
    assert parse_controller("dog:1,2,3", several_strengths=True) == ControllerChoice("dog", (1.0, 2.0, 3.0))
    assert parse_controller(r"C:\dog.safetensors") == ControllerChoice(r"C:\dog.safetensors")
    assert parse_controller(r"C:\dog.safetensors:2") == ControllerChoice(r"C:\dog.safetensors", (2.0,))
    (tmp_path / "dog:2").touch()
    assert parse_controller("dog:2") == ControllerChoice("dog:2")
    assert parse_controller("dog:2:3") == ControllerChoice("dog:2", (3.0,))
    for text in ("dog.safetensors", "dog.safetensors:-2"):
        assert str(parse_controller(text)) == text


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with controllers of concepts a and b and some prompts."""
    monkeypatch.chdir(tmp_path)
    model = chatting()
    controller_for(model).save("a.safetensors")
    controller_for(model, "b").save("b.safetensors")
    (tmp_path / "prompts.txt").write_text("One sentence.\nAnd another.\n")
    small(monkeypatch)
    return tmp_path


@pytest.mark.parametrize("command", ["certify", "linearity"])
def test_certify_and_linearity_run_at_the_strength_after_the_file(command: str, files: Path) -> None:
    def numbers(*arguments: str) -> Any:
        result = run(command, "tiny", "--prompts", "prompts.txt", "--json", *arguments)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    own = numbers("-c", "a.safetensors:1.5")
    assert (own if command == "certify" else own["applied"])["strengths"] == [1.5]
    assert own == numbers("-c", "a.safetensors", "--strengths", "1.5")
    assert "both say how strongly" in refused(command, "tiny", "-c", "a.safetensors:2", "--strengths", "1,2")
    assert "one controller at a time" in refused(command, "tiny", "-c", "a.safetensors", "-c", "b.safetensors")
    assert "strength 0" in refused(command, "tiny", "-c", "a.safetensors:0")


Numbers = list[float] | None


def choices(*texts: str) -> list[ControllerChoice]:
    return [parse_controller(text) for text in texts]


def effective(
    *texts: str, strengths: list[float] | None = None, shares: list[float] | None = None
) -> list[list[float]]:
    """The strength of each controller, at each strength that is run."""
    steering, numbers = sweep(choices(*texts), strengths, shares)
    assert steering is not None
    return [steering.strength(number) for number in numbers]


def test_a_number_after_a_file_is_the_strength_it_steers_at(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert effective("a.safetensors") == [[0.35], [0.7], [1.4]]
    assert effective("a.safetensors", strengths=[4, 5]) == [[4], [5]]
    assert effective("a.safetensors", "b.safetensors", shares=[1, -0.5]) == [[0.35, -0.175], [0.7, -0.35], [1.4, -0.7]]
    assert capsys.readouterr().err == ""
    assert effective("a.safetensors:2") == [[2]]
    assert "measured at one strength only, a.safetensors:2;" in capsys.readouterr().err
    assert effective("a.safetensors:2", "b.safetensors:-1") == [[2, -1]]
    assert effective("a.safetensors:2", "b.safetensors:2") == [[2, 2]]
    assert effective("a.safetensors:0", "b.safetensors:0.1") == [[0, 0.1]]
    assert sweep([], [1.0], None) == (None, [0.0])


@pytest.mark.parametrize(
    ("texts", "strengths", "shares", "says"),
    [
        (["a.safetensors:1"], [1.0, 2.0], None, "--strengths and -c a.safetensors:1 both say how strongly"),
        (["a.safetensors:1", "b.safetensors:-0.5"], [1.0, 2.0], None, "both say how strongly"),
        (["a.safetensors", "b.safetensors:-0.5"], [1.0, 2.0], None, "both say how strongly"),
        (["a.safetensors:1", "b.safetensors:2"], None, [1.0, 2.0], "--shares and -c a.safetensors:1 both say"),
        (["a.safetensors", "b.safetensors:-0.5"], None, None, "give every -c a strength"),
        (["a.safetensors", "b.safetensors"], None, [1.0], "--shares needs a number for every -c: 2, not 1"),
        ([], None, [1.0], "--shares needs a number for every -c: 0, not 1"),
    ],
)
def test_a_strength_that_could_be_meant_in_two_ways_is_refused(
    texts: list[str], strengths: Numbers, shares: Numbers, says: str, files: Path
) -> None:
    with pytest.raises(InputError, match=says.replace("(", r"\(")):
        sweep(choices(*texts), strengths, shares)


def test_compare_takes_lists_and_refuses_strengths_for_nobody(files: Path) -> None:
    task = "compare", "concept", "tiny", "--words", "x", "-o", "out"
    own = "-c", "a.safetensors:1,2", "-c", "b.safetensors:3,4"
    assert "--strengths and -c a.safetensors:1,2 both" in refused(*task, *own, "--strengths", "1,2")
