"""A conversation on a terminal and in a pipe: editing, Ctrl-C, and what is saved."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_lqr.backends.protocol import Model
from mlx_lqr.convert.sources import demo_model

if sys.platform == "win32":
    pytest.skip("needs the terminals and signals of POSIX", allow_module_level=True)

import fcntl
import pty
import select
import termios

EDITING = b"\x1b[?2004h"
"""What a line editor tells the terminal when it is ready: mark what is pasted."""


def read_until(source: int, wanted: bytes, seconds: float = 60) -> bytes:
    """What comes from a file descriptor until `wanted` has come."""
    received, deadline = b"", time.monotonic() + seconds
    while wanted not in received:
        assert time.monotonic() < deadline, received
        if select.select([source], [], [], 0.2)[0]:
            part = os.read(source, 4096)
            assert part, received
            received += part
    return received


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


@contextmanager
def on_a_terminal(*arguments: str, cache: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`mlx-lqr chat demo` with a terminal for its input and messages and a pipe for its answers."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x28\x00\x78\x00\x00\x00\x00\x00")  # 40 rows, 120 columns
    code = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from mlx_lqr.commands import main; main()"
    command = [sys.executable, "-c", code, "chat", "demo", *arguments]
    environment = {**os.environ, "TERM": "xterm", "MLX_LQR_CACHE": str(cache), "PROMPT_TOOLKIT_NO_CPR": "1"}
    streams: dict[str, Any] = {"stdin": theirs, "stdout": subprocess.PIPE, "stderr": theirs}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
    os.close(theirs)
    with process:
        try:
            yield process, ours
        finally:
            process.kill()
            os.close(ours)


def test_a_chat_on_a_terminal(tmp_path: Path, smollm2: Model) -> None:
    """Several lines in one message, Ctrl-C at the prompt and during an answer, a mistake, and Ctrl-D."""
    (tmp_path / "demo").symlink_to(demo_model().parent)
    saved = tmp_path / "chat.json"
    with on_a_terminal("-n", "4000", "--temperature", "0", cache=tmp_path) as (process, terminal):
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
