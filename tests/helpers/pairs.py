"""Two `mlx-lqr` processes at once, many times: `python pairs.py < [[first, second], ...]`, each a list of arguments.

Prints a line of JSON for each pair, the exit status and what was said on stderr of either. Processes are forked, since
most of a command's time is that of its imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

Ended = tuple[int, str]
"""Exit status, stderr"""


def run_pairs(pairs: Sequence[tuple[list[str], list[str]]]) -> list[tuple[Ended, Ended]]:
    """How both processes of each pair ended."""
    asked = json.dumps([[[str(argument) for argument in one] for one in pair] for pair in pairs])
    done = subprocess.run([sys.executable, __file__], input=asked, capture_output=True, text=True, check=True)
    return [((*first,), (*second,)) for first, second in map(json.loads, done.stdout.splitlines())]


def _at_once(pair: list[list[str]]) -> list[Ended]:
    started: list[tuple[int, IO[str]]] = []
    for arguments in pair:
        says: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - read when the process has ended
        if not (child := os.fork()):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(says.fileno(), 2)
            status: Any = 70
            try:
                main(arguments)
            except SystemExit as end:
                status = end.code
            finally:
                sys.stderr.flush()
                os._exit(status if isinstance(status, int) else 0)
        started.append((child, says))
    ended = []
    for child, says in started:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        says.seek(0)
        ended.append((status, says.read()))
    return ended


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))
    from mlx_lqr.commands import main

    for module in ("scipy.linalg", "rich.progress", "filelock", "jinja2"):
        __import__(module)
    for pair in json.load(sys.stdin):
        print(json.dumps(_at_once(pair)), flush=True)
