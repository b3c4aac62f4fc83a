"""Where MLX computes: the one place that asks, so that tests can rehearse on the CPU what is done on a Mac's GPU.

With the environment variable `MLX_LQR_REHEARSE=metal` the answers are those of a Mac with Metal: the checkpoint's dtype
is kept, laws are placed in it, no BLAS is loaded or missed, weights keep their layout, and no step is compiled.
"""

from __future__ import annotations

import os
import sys

from mlx_lqr.errors import InputError

REHEARSE = "MLX_LQR_REHEARSE"


def rehearsing() -> bool:
    """Whether to do what is done on a Mac's GPU."""
    machine = os.environ.get(REHEARSE, "")
    if machine not in ("", "metal"):
        raise InputError(f'{REHEARSE}={machine} is unknown: set it to "metal", or not at all')
    return machine == "metal"


def on_gpu() -> bool:
    """Whether MLX computes on a GPU."""
    import mlx.core as mx

    return rehearsing() or mx.default_device() != mx.cpu


def device_name() -> str:
    """What MLX computes on, as "Apple M3 Max" or "CPU"."""
    import mlx.core as mx

    device = mx.default_device()
    return "CPU" if device == mx.cpu else str(mx.device_info().get("device_name", device))


def on_mac() -> bool:
    return rehearsing() or sys.platform == "darwin"


def on_linux() -> bool:
    return not rehearsing() and sys.platform == "linux"
