"""Commands in several processes, started by mlx.launch on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import metadata

SECONDS = 300
"""After which a launch that hangs is killed; an idle machine takes a tenth of it."""


def launched(count: int, command: Sequence[object], text: str = "") -> subprocess.CompletedProcess[str]:
    """What a command comes to in `count` processes, each with the text on its standard input."""
    (entry,) = metadata.entry_points(group="console_scripts", name="mlx.launch")
    start = f"from {entry.module} import {entry.attr} as main; main()"
    launcher = [sys.executable, "-c", start, "-n", str(count), "--backend", "ring", "-p", str(_free_ports(count)), "--"]
    arguments = [*launcher, *map(str, command)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        arguments, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(text, timeout=SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    while True:
        with ExitStack() as held, socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                for following in range(port + 1, port + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", following))
            except (OSError, OverflowError):
                continue
            return port
