"""Whether this process is one of several that `mlx.launch` has started, by what it tells them; MLX is not imported.

All of them, the ranks 0 .. n - 1, run the same command. Rank 0 alone speaks and writes files.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from mlx_lqr.errors import InputError

_LISTS = ("MLX_HOSTFILE", "MLX_IBV_DEVICES")
"""Of the ring and of RDMA: files with a list that has an entry for each rank"""


def rank() -> int:
    """The number of this process; 0 where it is alone."""
    return int(os.environ.get("MLX_RANK", "0")) if count() > 1 else 0


def count() -> int:
    """How many processes there are."""
    if "MLX_RANK" not in os.environ:
        return 1
    if (number := os.environ.get("MLX_WORLD_SIZE")) is not None:
        return int(number)
    return max((_entries(Path(file)) for name in _LISTS if (file := os.environ.get(name))), default=1)


def _entries(file: Path) -> int:
    try:
        text = file.read_text("utf-8").strip()
        return len(json.loads(text)) if text else 1  # mlx.launch leaves it empty for one process
    except (OSError, ValueError) as error:
        raise InputError(f"{file}, which mlx.launch has written, cannot be read: start it again") from error


def refuse_several(what: str) -> None:
    """Raise `InputError` under `mlx.launch`, for what one process does alone.

    Args:
        what: the subject and verb of the message.
    """
    if count() > 1:
        raise InputError(f"{what} in one process: run it without mlx.launch")
