"""`--help` can be scanned: nothing is cut short, all is explained, options and commands stand under headings."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import click
import pytest
from helpers.command_line import Words, all_commands, run

from mlx_lqr.commands import help, main

COMMANDS = Path(help.__file__).parent

every = pytest.mark.parametrize(
    ("path", "command"), [pytest.param(path, command, id=" ".join(path)) for path, command in all_commands() if path]
)
with_headings = pytest.mark.parametrize(
    ("path", "command"),
    [pytest.param(path, command, id=" ".join(path)) for path, command in all_commands() if path],
)


@every
def test_no_help_is_cut_short(path: Words, command: click.Command) -> None:
    """Neither on a terminal of 80 columns nor at click's own limit, which completion in a shell uses."""
    assert "..." not in run(*path, "--help").stdout.replace("COMMAND [ARGS]...", "")
    short = command.get_short_help_str()
    assert short.endswith(".")
    assert not short.endswith("...")


def test_the_list_of_commands_is_not_cut_short() -> None:
    text = run("--help").stdout
    assert "..." not in text.replace("COMMAND [ARGS]...", "")
    for command in main.commands.values():
        assert f"  {command.name} " in text
        assert command.get_short_help_str() in text


@with_headings
def test_everything_is_explained_under_a_heading(path: Words, command: click.Command) -> None:
    for parameter in command.params:
        assert isinstance(parameter, help.Argument | help.Option)
        assert parameter.help
    text = run(*path, "--help").stdout
    assert max(map(len, text.splitlines())) <= 80


@every
def test_what_a_model_is_is_said_wherever_one_is_taken(path: Words, command: click.Command) -> None:
    if any(parameter.name == "model" for parameter in command.params):
        assert 'a .gguf file, or "demo".' in " ".join(run(*path, "--help").stdout.split())


def headings(*path: str) -> list[str]:
    """The headings of a help text, in their order."""
    lines = run(*path, "--help").stdout.splitlines()
    return [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]


def test_commands_and_options_stand_under_headings() -> None:
    assert headings() == ["Start here", "Fit a controller", "Steer a model", "Measure", "Files", "Other"]
    assert headings("generate") == ["Arguments", "Text", "Steering", "Decoding", "Output", "Loading the model", "Other"]
    assert headings("eval") == ["Commands", "Other"]
    order = ["Arguments", *help.HEADINGS]
    for path, _ in all_commands():
        if path and "Commands" not in (given := headings(*path)):
            assert given == sorted(given, key=order.index)


def test_every_command_is_in_one_section() -> None:
    listed = [command.name for section in main.sections.values() for command in section]
    assert sorted(map(str, listed)) == sorted(main.commands)


def test_an_unknown_heading_is_refused() -> None:
    with pytest.raises(ValueError, match="Weather"):
        help.Option(["--rain"], heading="Weather", help="More or less.")


SEVERAL_MEANINGS = {"--strengths": "tune searches between two"}
"""Options of one name that commands mean differently, and why"""


def declared() -> dict[str, list[str]]:
    """Where each option is declared: file and line, by its name."""
    places: dict[str, list[str]] = defaultdict(list)
    for file in sorted(COMMANDS.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or getattr(node.func, "attr", getattr(node.func, "id", "")) != "option":
                continue
            for argument in node.args:
                if isinstance(argument, ast.Constant) and str(argument.value).startswith("-"):
                    for name in str(argument.value).split("/"):
                        places[name].append(f"{file.name}:{node.lineno}")
    return places


def test_every_option_is_declared_once() -> None:
    places = declared()
    assert {"-c", "--controller", "--strengths", "--seed", "--json", "--backend", "--temperature"} <= places.keys()
    twice = {name: where for name, where in places.items() if len(where) > 1 and name not in SEVERAL_MEANINGS}
    assert not twice
