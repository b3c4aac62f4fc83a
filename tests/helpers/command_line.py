"""The command line inside this process: what a command prints, and the one line with which it refuses."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from mlx_lqr.backends.protocol import Model
from mlx_lqr.commands import main

PROMPT = "Once upon a time,"
Words = tuple[str, ...]
"""How a command is called: eval, concept."""
LEAST = {"eval lm-eval": ["--tasks", "x"], "toxicity": ["--data", "x"], "truthfulness": ["--data", "x"]}
LEAST |= {"refusal": ["--data", "x"]}
"""What commands need that measure, besides a model and a folder."""
PROMPTS = [PROMPT, "The", "A man walks into a bar and"]


def run(*arguments: object, text: str | None = None) -> Result:
    """What `mlx-lqr ARGUMENTS` comes to, with `text` on its standard input."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=text)


def refused(*arguments: object, text: str | None = None) -> str:
    """The one line of a refusal."""
    result = run(*arguments, text=text)
    assert result.exit_code == 2, (result.output, result.exception)
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("Note: ")]
    assert "Traceback" not in result.stderr
    if lines[0].startswith("Usage:"):  # click's own refusals name the usage first
        lines = lines[-1:]
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    return lines[0]


def answers(*arguments: object) -> list[dict[str, Any]]:
    """The JSON objects that `generate demo` prints; of the likeliest tokens, unless the arguments say otherwise."""
    result = run("generate", "demo", "--temperature", 0, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def small(monkeypatch: pytest.MonkeyPatch) -> Model:
    """Let commands load a model that takes any text."""
    from helpers.tiny_tokenizers import chatting  # which needs MLX

    model = chatting()
    model._tokenizer.encode = lambda text, **_: [ord(letter) % 59 for letter in text][-8:]  # type: ignore[union-attr, method-assign]
    for name in ("fit", "analysis", "running"):
        monkeypatch.setattr(importlib.import_module(f"mlx_lqr.commands.{name}"), "load", lambda *_, **__: model)
    return model


def all_commands(group: click.Group = main, path: Words = ()) -> Iterator[tuple[Words, click.Command]]:
    """Every group and command, by the words that call it."""
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from all_commands(command, (*path, name))
        else:
            yield (*path, name), command


def steering_commands() -> list[tuple[tuple[str, ...], click.Parameter]]:
    """Every command with -c, and its parameter."""
    return [
        (path, parameter) for path, command in all_commands() for parameter in command.params if "-c" in parameter.opts
    ]


def written(path: tuple[str, ...], controller: str) -> list[str]:
    """The least that the command takes, with this after -c."""
    command = [*path, "no-such-model", "-c", controller]
    if path[0] in ("eval", "compare"):
        command += ["-o", "out", *LEAST.get(path[-1], LEAST.get(" ".join(path), []))]
    return command


def scored(texts: Sequence[str]) -> list[float]:
    """A scorer for the toxicity task."""
    return [len(text) % 7 / 7 for text in texts]
