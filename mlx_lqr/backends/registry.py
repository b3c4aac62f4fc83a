"""The list of backends. Nothing else names them all: choices, messages and tests are made from it."""

from __future__ import annotations

import functools
import importlib
from typing import Literal, get_args

from mlx_lqr.backends.backend import Backend

Name = Literal["mlx", "torch", "llama"]
"""A further backend is a folder beside this file, whose `backend.py` has a `BACKEND`, and its name here. Where several
suit a machine equally well, "auto" takes the first."""


def backends() -> tuple[Backend, ...]:
    return tuple(map(backend, get_args(Name)))


@functools.cache
def backend(name: str) -> Backend:
    """The backend of this name, which has to be one of `Name`; its framework is not imported."""
    chosen: Backend = importlib.import_module(f"mlx_lqr.backends.{name}.backend").BACKEND
    return chosen
