"""On Linux, put a tuned BLAS in front of the reference BLAS that MLX's CPU wheel is linked to.

MLX's wheel calls plain `cblas_sgemm`. A library that exports this symbol and is loaded globally *before* `mlx.core`
wins the symbol look-up: 3 to 6 GFLOP/s become about 200 on two cores. macOS uses Accelerate and needs none of this.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import warnings
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from mlx_lqr.backends.mlx.device import on_linux

SETTING = "MLX_LQR_BLAS"
_SYSTEM_LIBRARIES = ("libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.3", "libmkl_rt.so.2", "libblis.so.4")

_loaded: str | None = None
_too_late = False
_warned = False


def preload() -> str | None:
    """Load the first tuned BLAS that is here and return its file, or None where there is none or none is needed.

    The environment variable `MLX_LQR_BLAS` names a library to load instead, or says `off`.
    """
    global _loaded, _too_late
    if not on_linux() or _loaded is not None:
        return _loaded
    if "mlx.core" in sys.modules:
        _too_late = True
        return None
    wanted = os.environ.get(SETTING, "")
    if wanted == "off":
        return None
    for library in [wanted] if wanted else [*_mkl_wheel(), *_SYSTEM_LIBRARIES]:
        try:
            handle = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if hasattr(handle, "cblas_sgemm"):
            _loaded = library
            _suit_amd(handle)
            break
    return _loaded


_CBWR_AUTO = 2
"""MKL's `MKL_CBWR_AUTO`: whatever instructions the processor has, and the same sums in every run"""


def _suit_amd(library: ctypes.CDLL) -> None:
    """On AMD's processors put MKL into its reproducible mode, where it takes other kernels for them.

    It then multiplies 2 to 32 vectors in a half to five sixths of the time (on a Zen 5, 8 vectors with the weights of
    SmolLM2's blocks in 29 ms and not 45, and with its head in 7.5 and not 14), one or hundreds in the same.
    """
    if "MKL_CBWR" in os.environ or not hasattr(library, "MKL_CBWR_Set"):
        return
    with suppress(OSError):
        if "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"):
            library.MKL_CBWR_Set(_CBWR_AUTO)


def warn_if_slow() -> None:
    """Say once a process, and only where it matters, that matrix products run on the reference BLAS."""
    global _warned
    if not on_linux() or _loaded is not None or _warned or os.environ.get(SETTING) == "off":
        return
    _warned = True
    if _too_late:
        mend = "import mlx_lqr before mlx"
    elif platform.machine() == "x86_64":
        mend = "pip install mkl"
    else:
        mend = "install OpenBLAS (Debian and Ubuntu: apt install libopenblas0)"
    warnings.warn(
        f"no tuned BLAS in use: large matrix products run about 30 times slower than they could; {mend}",
        RuntimeWarning,
        stacklevel=2,
    )


def _mkl_wheel() -> list[str]:
    """Where pip put MKL's dispatching library, whatever the installation scheme."""
    try:
        files = metadata.distribution("mkl").files or []
    except metadata.PackageNotFoundError:
        return []
    return [str(Path(str(file.locate())).resolve()) for file in files if file.name.startswith("libmkl_rt.so")]
