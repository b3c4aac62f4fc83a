"""A Mac's GPU, rehearsed on the CPU: the switch that takes its branches, and a guard that fails where Metal would.

NumPy has no bfloat16, so that a view of such an array fails here by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest

from mlx_lqr.backends.mlx.device import REHEARSE

CPU_ONLY = {
    *("cholesky", "cholesky_inv", "eig", "eigh", "eigvals", "eigvalsh", "inv", "lu", "lu_factor", "pinv", "qr"),
    *("solve", "solve_triangular", "svd", "tri_inv", "det", "slogdet"),
}
"""Of mx.linalg: without a CPU stream they raise on a GPU."""


class NotOnMetalError(Exception):
    """What would have failed on a Mac's GPU."""


def rehearse(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone, take the branches of a Mac's GPU, and fail where it would."""
    patch.setenv(REHEARSE, "metal")
    for module in (mx, mx.random, mx.fast, mx.linalg):
        for name, function in vars(module).items():
            if callable(function) and not isinstance(function, type) and not name.startswith("__"):
                patch.setattr(module, name, _guarded(module, name, function))
    astype, array = mx.array.astype, mx.array
    patch.setattr(mx.array, "astype", _guarded(mx, "array.astype", astype))

    class Kind(type):
        """Stands in for the class in calls and in questions for an instance."""

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return _guarded(mx, "array", array)(*args, **kwargs)

        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, array)

        def __getattr__(cls, name: str) -> Any:
            return getattr(array, name)

    patch.setattr(mx, "array", Kind("array", (), {}))


def _guarded(module: ModuleType, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        stream = kwargs.get("stream")
        if not (isinstance(stream, mx.DeviceType) and stream == mx.cpu):
            where = f"{module.__name__}.{name}"
            if module is mx.linalg and name in CPU_ONLY:
                raise NotOnMetalError(f"{where} is computed on the CPU alone: give it stream=mx.cpu")
            if any(_is_float64(value) for value in (*args, *kwargs.values())):
                raise NotOnMetalError(f"{where}: Metal has no float64")
        return function(*args, **kwargs)

    return call


def _is_float64(value: Any) -> bool:
    dtype = value if isinstance(value, mx.Dtype) else getattr(value, "dtype", None)
    return isinstance(dtype, mx.Dtype) and dtype == mx.float64
