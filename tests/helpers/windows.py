"""Collect all tests as if this were Windows: without what only POSIX has, with MLX and without it.

    python tests/helpers/windows.py

They are collected as they are before, which imports other libraries: those would look for another system's files.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

PLATFORM = sys.platform
TESTS = Path(__file__).parents[1]
MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty")
NAMES = {
    os: ("fork", "geteuid", "getuid", "killpg", "mkfifo", "openpty", "register_at_fork", "setsid", "uname"),
    signal: ("SIGALRM", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "alarm", "setitimer"),
}
"""What Windows does not have, of the standard library"""


class Windows:
    """A pytest plugin: while tests are collected, this is Windows."""

    def pytest_sessionstart(self) -> None:
        sys.platform = "win32"

    def pytest_sessionfinish(self) -> None:
        sys.platform = PLATFORM


def collect(*plugins: object) -> int:
    arguments = ["--collect-only", "--quiet", "--quiet", "-p", "no:cacheprovider", str(TESTS)]
    return int(pytest.main(arguments, plugins=plugins))


def forget_own_modules() -> None:
    """So that the test files and what they import of ours are imported again."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name != "__main__" and file is not None and Path(file).is_relative_to(TESTS.parent) and ".venv" not in file:
            del sys.modules[name]


def hide(package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]


def main() -> int:
    if status := collect():
        return status
    for module, names in NAMES.items():
        for name in names:
            delattr(module, name)
    for hidden in (MODULES, ("mlx", "mlx_lm")):
        forget_own_modules()
        for name in hidden:
            hide(name)
        if status := collect(Windows()):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
