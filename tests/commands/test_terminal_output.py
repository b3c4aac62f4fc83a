"""Text of files, models and tokenizers: as it is in a pipe, and on a terminal never a command to it."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.backends import tiny_folder, tiny_on
from helpers.command_line import run
from helpers.controllers import controller_for
from tokenizers import Tokenizer, decoders, models

import mlx_lqr
from mlx_lqr.commands import main
from mlx_lqr.commands.chat_view import draw_comparison
from mlx_lqr.commands.tables import show_table
from mlx_lqr.files.private import keep_private
from mlx_lqr.runtime import __main__ as edge
from mlx_lqr.runtime.streams import printable

if sys.platform == "win32":
    pytest.skip("needs the terminals of POSIX", allow_module_level=True)

import pty
import select

HARMFUL = "\x1b]0;title\x07\x9b31m\x1b[2J\r\x08\u202e\u2066"
ESCAPED = r"\x1b]0;title\x07\x9b31m\x1b[2J\r\x08\u202e\u2066"
COMMANDS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Inside this context stdout and stderr are a terminal; afterwards the list has what it was sent."""
    ours, theirs = pty.openpty()
    shown: list[str] = []
    with open(theirs, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        yield shown
        stream.flush()
        received = b""
        while select.select([ours], [], [], 0.2)[0]:
            received += os.read(ours, 65536)
    os.close(ours)
    shown.append(received.decode().replace("\r\n", "\n"))


def on_terminal(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> str:
    with terminal(monkeypatch) as shown, pytest.raises(SystemExit):
        main([str(argument) for argument in arguments])
    return shown[0]


def without_style(text: str) -> str:
    """What a terminal was sent, without bold and grey, which commands set themselves."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose every token is harmful, with a chat template."""
    folder = tiny_folder("llama")
    tokenizer = Tokenizer(models.WordLevel({f"{HARMFUL}{i}": i for i in range(64)}, unk_token=f"{HARMFUL}0"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def test_what_commands_a_terminal_is_escaped_there_and_nothing_else() -> None:
    class Stream:
        def __init__(self, *, is_terminal: bool) -> None:
            self.isatty = lambda: is_terminal

    every = "".join(map(chr, range(0x3000)))
    shown = printable(every, Stream(is_terminal=True))
    assert COMMANDS.search(shown) is None
    assert "\t" in shown
    assert "\n" in shown
    kept = [letter for letter in every if letter in shown]
    assert {*every} - {*kept} == {*COMMANDS.findall(every), "\r"}
    assert printable(HARMFUL, Stream(is_terminal=True)) == ESCAPED
    assert printable("a\r\nb é 你 👩‍👩‍👧 שלום", Stream(is_terminal=True)) == "a\r\nb é 你 👩‍👩‍👧 שלום"
    assert printable(HARMFUL, Stream(is_terminal=False)) == HARMFUL
    assert printable(HARMFUL, None) == HARMFUL


def test_generate_shows_what_a_model_says(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["generate", model, "-p", "w", "-n", 2, "--temperature", 0]
    shown = on_terminal(monkeypatch, *given)
    assert COMMANDS.search(shown) is None
    assert shown.count(ESCAPED) == 2
    assert run(*given).stdout.count(HARMFUL) == 2
    with terminal(monkeypatch) as direct:
        assert edge.main([str(argument) for argument in given[1:]]) == 0
    assert direct[0] == shown


def test_generate_shows_prompts_of_a_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": HARMFUL}) + "\n")
    shown = without_style(on_terminal(monkeypatch, "generate", model, "--prompts", file, "-n", 1, "--temperature", 0))
    assert COMMANDS.search(shown) is None
    assert shown.count(ESCAPED) == 2
    assert run("generate", model, "--prompts", file, "-n", 1, "--temperature", 0).stdout.count(HARMFUL) == 2


def test_chat_shows_what_a_model_says(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = tmp_path / "lines"
    lines.write_text("w\n")
    with lines.open() as stdin, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        shown = on_terminal(monkeypatch, "chat", model, "-n", 2, "--temperature", 0).replace("\n", "")
    assert COMMANDS.search(shown) is None
    assert shown.count(ESCAPED) == 2


def test_show_shows_what_a_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controller = controller_for(tiny_on("mlx", "llama"))
    harmful = replace(controller, concepts=(HARMFUL,), model_name=HARMFUL)
    file = tmp_path / "c.safetensors"
    harmful.save(file)
    shown = on_terminal(monkeypatch, "show", file)
    assert COMMANDS.search(shown) is None
    assert shown.count(ESCAPED) == run("show", file).stdout.count(HARMFUL) >= 2


def test_refusals_and_tables_show_what_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in (["show", f"missing{HARMFUL}"], [f"--{HARMFUL}"], ["show", f"--{HARMFUL}"], [HARMFUL]):
        shown = on_terminal(monkeypatch, *given)
        assert COMMANDS.search(shown) is None
        assert r"\x1b]0;title" in shown
    with terminal(monkeypatch) as table:
        show_table([HARMFUL], [[HARMFUL]], title=HARMFUL)
    assert COMMANDS.search(without_style(table[0])) is None
    assert table[0].count(r"\x1b]0;title") == 3


def test_commands_print_by_one_function_alone() -> None:
    folder = Path(mlx_lqr.__file__).parent / "commands"
    for file in folder.glob("*.py"):
        if file.name != "output.py":
            assert not re.search(r"click\.(secho|echo)\b|(?<!console\.)\bprint\(", file.read_text()), file


def test_what_was_said_is_for_its_owner_alone(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    before = os.umask(0)
    try:
        result = run("chat", model, "-n", 1, "--temperature", 0, text=f"w\n/save {file}\n")
        assert "others" not in result.stderr
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        file.chmod(0o644)
        result = run("chat", model, "-n", 1, "--temperature", 0, text=f"w\n/save {file}\n")
        assert f"Note: others could open {file}: now its owner alone can" in result.stderr
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_a_history_that_others_could_open_is_closed_to_them(tmp_path: Path) -> None:
    history = tmp_path / "chat_history"
    assert not keep_private(history)
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    history.write_text("said")
    history.chmod(0o664)
    assert keep_private(history)
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert history.read_text() == "said"


def test_a_comparison_shows_what_a_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as shown:
        draw_comparison([(HARMFUL, iter([mlx_lqr.Piece(HARMFUL, 1)]))])
    assert r"\x1b]0;title" in shown[0]
    assert not {"\x1b]", "\x07", "\x9b", "\x08", "\u202e"} & {*shown[0], *re.findall("\x1b.", shown[0])}
