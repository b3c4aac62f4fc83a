"""Whether llama.cpp, where it computes here, multiplies numbers in float32 as such."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest

import mlx_lqr
from helpers import device_memory
from helpers.tiny_gguf import write
from mlx_lqr.backends.llama.library import device_name


def on_a_gpu() -> bool:
    return device_memory.endpoint is None and device_name() != "CPU"


@functools.cache
def rounded() -> bool:
    """CUDA's kernels take TF32, of 10 bits, for float32: streams are then MLX's to a thousandth alone."""
    if not on_a_gpu():
        return False
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder) / "tiny.gguf", "llama", metadata={"general.file_type": 0}).path
        ours, mlx = mlx_lqr.load(file, backend="llama"), mlx_lqr.load(file, backend="mlx", dtype="float32")
    prompts = [[5, 17, 3, 42, 8], [1, 2, 3, 4, 5, 6, 7, 8]]
    expected = mlx.residuals(prompts)
    return bool(np.abs(ours.residuals(prompts) - expected).max() > 1e-4 * np.abs(expected).max())


def in_float32() -> pytest.MarkDecorator:
    """For tests that compare tokens, or streams to a few digits, with those of another backend."""
    reason = "llama.cpp rounds products on this GPU: docs/backends/llama.md tells how to build it so that it does not"
    return pytest.mark.skipif(rounded(), reason=reason)
