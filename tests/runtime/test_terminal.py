"""A conversation on a terminal and in a pipe: editing, Ctrl-C, and what is saved."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.terminal import EDITING, chat_on_a_terminal, read_until

from mlx_lqr.backends.protocol import Model
from mlx_lqr.convert.sources import demo_model

if sys.platform == "win32":
    pytest.skip("needs the terminals and signals of POSIX", allow_module_level=True)

import termios


def test_ctrl_c_stops_an_answer_in_a_pipe(tmp_path: Path, smollm2: Model) -> None:
    command = [sys.executable, "-c", "from mlx_lqr.commands import main; main()", "chat", "demo"]
    command += ["-n", "4000", "--temperature", "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"Write a very long story.\n")
        process.stdin.flush()
        first = read_until(process.stdout.fileno(), b" ")
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(f"/save {tmp_path}/chat.json\n".encode(), timeout=60)
    assert process.returncode == 0, errors
    assert b"[stopped]" in errors
    assert b"Traceback" not in errors
    (_, answer) = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert (first + rest).decode() == answer["content"] + "\n"


def test_a_chat_on_a_terminal(tmp_path: Path, smollm2: Model) -> None:
    """Several lines in one message, Ctrl-C at the prompt and during an answer, a mistake, and Ctrl-D."""
    (tmp_path / "demo").symlink_to(demo_model().parent)
    saved = tmp_path / "chat.json"
    given = "-n", "4000", "--temperature", "0"
    with chat_on_a_terminal(*given, cache=tmp_path, stdout=subprocess.PIPE) as chat:
        process, terminal = chat.process, chat.ours
        assert process.stdout is not None
        read_until(terminal, EDITING)
        os.write(terminal, b"never sent\x03")
        read_until(terminal, EDITING)
        os.write(terminal, b"One\x1b\rtwo\\\rthree\x1b[200~ and\nfour\x1b[201~, a long story\r")
        answer = read_until(process.stdout.fileno(), b" ")
        os.write(terminal, b"typed")
        answer += read_until(process.stdout.fileno(), b" ")
        os.write(terminal, b"\x03")
        shown = read_until(terminal, EDITING)
        assert b"[stopped]" in shown
        assert b"typed" not in shown  # keys pressed during an answer do not appear in it
        os.write(terminal, b"/track\r")
        assert b"Error: the last answer was not steered" in read_until(terminal, EDITING)
        os.write(terminal, f"/save {saved}\r".encode())
        read_until(terminal, EDITING)
        os.write(terminal, b"\x04")
        answer += process.stdout.read()
        assert process.wait(60) == 0
        assert termios.tcgetattr(terminal)[3] & termios.ECHO
    question, reply = json.loads(saved.read_text())["messages"]
    assert question["content"] == "One\ntwo\nthree and\nfour, a long story"
    assert answer.decode() == reply["content"] + "\n"
    history = tmp_path / "chat_history"
    assert "four, a long story" in history.read_text()
    assert [stat.S_IMODE(file.stat().st_mode) for file in (history, saved)] == [0o600, 0o600]
