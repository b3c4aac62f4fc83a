"""A command on a pseudo-terminal: what is typed goes to it, and its screen shows what a person would see."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyte
import pytest

if sys.platform == "win32":
    pytest.skip("needs the terminals and signals of POSIX", allow_module_level=True)

import fcntl
import pty
import select
import struct
import termios

EDITING = b"\x1b[?2004h"
"""What a line editor tells the terminal when it is ready: mark what is pasted."""
ROWS = 200
"""So many that nothing scrolls out of sight"""


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


class Terminal:
    """A process, and the terminal that it runs on."""

    def __init__(self, process: subprocess.Popen[bytes], ours: int, columns: int) -> None:
        self.process = process
        self.ours = ours
        self._screen = pyte.Screen(columns, ROWS)
        self._stream = pyte.ByteStream(self._screen)

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def until(self, shown: str) -> None:
        """Wait until the screen shows a text."""
        self._wait(lambda: shown in "\n".join(self.lines))

    def until_lines(self, count: int) -> None:
        """Wait until the screen shows more lines than these."""
        self._wait(lambda: len(self.lines) > count)

    def until_prompt(self, below: int = -1) -> None:
        """Wait until a new message can be typed in a line below this one."""
        cursor = self._screen.cursor
        self._wait(lambda: cursor.y > below and self._screen.display[cursor.y].rstrip() == ">" and cursor.x == 2)

    def enter(self, text: str) -> list[str]:
        """Type a line and Enter; the lines that the screen shows between it and the next prompt."""
        before = self._screen.cursor.y
        self.type(text + "\r")
        self.until_prompt(before)
        return self.lines[before + 1 : -1]

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "\n".join(self.lines)
            if select.select([self.ours], [], [], 0.2)[0]:
                self._stream.feed(os.read(self.ours, 4096))

    @property
    def lines(self) -> list[str]:
        """What the screen shows, without the spaces at the ends of lines."""
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip("\n").split("\n")

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, _size(columns))
        self._screen.resize(ROWS, columns)


@contextmanager
def chat_on_a_terminal(*arguments: str, cache: Path, columns: int = 120, stdout: Any = None) -> Iterator[Terminal]:
    """`mlx-lqr chat demo` with a terminal for its input and messages, and for its answers unless told otherwise.

    Args:
        cache: its cache folder.
        stdout: where answers go, as for `subprocess.Popen`.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, _size(columns))
    code = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from mlx_lqr.commands import main; main()"
    command = [sys.executable, "-c", code, "chat", "demo", *arguments]
    environment = {**os.environ, "TERM": "xterm", "MLX_LQR_CACHE": str(cache), "PROMPT_TOOLKIT_NO_CPR": "1"}
    for name in ("COLUMNS", "LINES"):
        environment.pop(name, None)
    streams: dict[str, Any] = {"stdin": theirs, "stdout": theirs if stdout is None else stdout, "stderr": theirs}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
    os.close(theirs)
    with process:
        try:
            yield Terminal(process, ours, columns)
        finally:
            process.kill()
            os.close(ours)


def _size(columns: int) -> bytes:
    return struct.pack("HHHH", ROWS, columns, 0, 0)
