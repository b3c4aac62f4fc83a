"""The command line inside this process: what a command prints, and the one line with which it refuses."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from mlx_lqr.commands import main

PROMPT = "Once upon a time,"
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
    """The JSON objects that `generate demo` prints."""
    result = run("generate", "demo", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]
