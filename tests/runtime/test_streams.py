"""What a command's streams may do to it: a full disk, an encoding without our characters, Ctrl-C, a pipe's newline."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import refused, run
from helpers.platforms import posix

from mlx_lqr.backends.protocol import Model
from mlx_lqr.runtime.__main__ import main as edge

COMMAND = [sys.executable, "-c", "from mlx_lqr.commands import main; main()"]


def started(*arguments: str, encoding: str = "utf-8", out: str | None = None, **options: Any) -> Any:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    with open(out if out is not None else os.devnull, "w") as place:
        stdout = place if out is not None else subprocess.PIPE
        return subprocess.run(
            [*COMMAND, *arguments], stdout=stdout, stderr=subprocess.PIPE, env=environment, check=False, **options
        )


@posix
@pytest.mark.parametrize("arguments", [["concepts", "--json"], ["--help"], ["generate", "demo", "-p", "Hi", "-n", "2"]])
def test_a_full_disk_is_one_line(arguments: list[str], smollm2: Model) -> None:
    done = started(*arguments, out="/dev/full")
    assert done.stderr.decode().splitlines()[-1] == "Error: cannot write the output: No space left on device"
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@posix
def test_a_full_disk_under_the_small_runtime(smollm2: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert edge(["demo", "-p", "Hi", "-n", "2", "--seed", "1"]) == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_does_not_have_is_escaped(encoding: str, tmp_path: Path) -> None:
    """Names of a user's own, tables and bars: what every command prints comes from these."""
    file = tmp_path / "chats \N{DOG FACE}.json"
    code = (
        "from helpers.drawings import show; "
        "from mlx_lqr.runtime.streams import accept_any_text; accept_any_text(); show()"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert ("█".encode() in done.stdout) == (encoding == "utf-8")
    assert (b"\\U0001f436" in done.stdout) == (encoding != "utf-8")
    if encoding == "latin-1":
        done = started("generate", str(file), "-p", "x", encoding=encoding)
        assert done.returncode == 2
        assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["Once\n", "Once\r\n", "\ufeffOnce\n"])
def test_a_pipe_ends_in_one_newline_that_is_not_the_prompts(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    module = importlib.import_module("mlx_lqr.commands.generate")
    monkeypatch.setattr(module, "load_to_run", lambda *_, **__: None)
    monkeypatch.setattr(module, "stream", lambda _, prompt, **__: iter(seen.append(prompt) or []))
    for piped, expected in ((text, "Once"), (text + "\n", "Once\n"), (text.rstrip(), "Once")):
        assert run("generate", "demo", text=piped).exit_code == 0
        assert seen.pop() == expected


@pytest.mark.parametrize("prompt", ["", "   ", "\n\n", "\u2003"])
def test_a_blank_prompt_is_refused(prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing but spaces" in refused("generate", "no-model-is-loaded", "-p", prompt)
    assert "nothing but spaces" in refused("generate", "no-model-is-loaded", text=prompt)
    assert edge(["no-model-is-loaded", "-p", prompt]) == 2


def test_more_tokens_than_the_context_holds_names_the_option(smollm2: Model) -> None:
    for tokens in ("99999999", "0", "-3"):
        assert "-n" in refused("generate", "demo", "-p", "Hi", "-n", tokens)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fit", "demo", "--concept", "dog", "-o", "x.safetensors"], "Stopped. Nothing was written."),
        (["linearize", "demo", "-o", "x.safetensors"], "Stopped. The same command goes on from here."),
        (["convert", "demo", "out"], "Stopped. Nothing was written."),
        (["generate", "demo", "-p", "Hi"], "Stopped."),
        (["demo"], "Stopped."),
        (["linearity", "demo"], "Stopped. Nothing was written."),
        (["tune", "concept", "demo", "--concept", "dog", "-o", "x.safetensors"], "Stopped. The same command goes on"),
        (["eval", "concept", "demo", "--words", "dog", "-o", "out"], "Stopped. The same command goes on from here."),
    ],
)
def test_ctrl_c_is_status_130_and_says_what_is_left(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    for name in ("fit", "running", "demo", "analysis", "task_options"):
        monkeypatch.setattr(importlib.import_module(f"mlx_lqr.commands.{name}"), "load", stopped)
    monkeypatch.setattr("mlx_lqr.convert.folder.convert", stopped)
    result = run(*arguments)
    assert result.exit_code == 130
    assert result.stderr.strip().startswith(says)
    assert len(result.stderr.strip().splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
