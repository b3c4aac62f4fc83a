"""The folder for files that can be made again: converted models, the demonstration model, its controller."""

from __future__ import annotations

import os
from pathlib import Path

SETTING = "MLX_LQR_CACHE"


def cache_folder() -> Path:
    """`$MLX_LQR_CACHE`, else `$XDG_CACHE_HOME/mlx-lqr`, else `~/.cache/mlx-lqr`. It may not exist yet."""
    if own := os.environ.get(SETTING):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "mlx-lqr"
