"""llama.cpp itself applies an exported control vector, and its logits move as ours do under the method's own law."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command_line import run
from helpers.tiny_gguf import VOCABULARY, write

import mlx_lqr
from mlx_lqr.files.control_vectors import read_control_vectors
from mlx_lqr.methods import law_of

llama_cpp = pytest.importorskip("llama_cpp")

TOKENS = [5, 17, 40, 8, 23]
SILENT = llama_cpp.llama_log_callback(lambda *_: None)
"""Held, since llama.cpp goes on calling it"""
SETS = [[1, 2, 3], [4, 5, 6], [7, 9]], [[9, 8, 7], [6, 5], [11, 12]]


@contextmanager
def loaded(file: Path) -> Iterator[tuple[Any, Any]]:
    """A model and a context of its low-level interface."""
    llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_threads, parameters.n_threads_batch = 64, 64, 1, 1
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    context = llama_cpp.llama_init_from_model(model, parameters)
    try:
        yield model, context
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def logits(context: Any) -> np.ndarray:
    """After TOKENS, from an empty cache: (V,)"""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    tokens = (llama_cpp.llama_token * len(TOKENS))(*TOKENS)
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(TOKENS))) == 0
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(VOCABULARY,)).copy()


def applied(context: Any, file: Path, layers: int, shifted: int = 0) -> None:
    """As llama.cpp's programs apply it: direction.N at row N - 1, for the layers from 1 on.

    Args:
        shifted: how many rows further on, which is wrong.
    """
    directions = read_control_vectors(file).directions
    rows = np.zeros((layers, len(next(iter(directions.values())))), np.float32)
    for layer, direction in directions.items():
        rows[layer - 1 + shifted] = direction
    pointer = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert llama_cpp.llama_set_adapter_cvec(context, pointer, rows.size, rows.shape[1], 1, layers) == 0


@pytest.mark.parametrize(("arch", "changes"), [("llama", {"num_hidden_layers": 4}), ("gemma3", {})])
def test_llama_cpp_moves_as_we_do(arch: str, changes: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", arch, **changes).path
    model = mlx_lqr.load(file, dtype="float32")
    fitted = mlx_lqr.fit_baseline(model, "actadd", *SETS, concept="one", layers=[1, 2], positions="all")
    fitted.save(tmp_path / "one.safetensors")
    vector = tmp_path / "one.gguf"
    result = run("export", tmp_path / "one.safetensors", file, "--control-vector", vector, "--strength", "2")
    assert result.exit_code == 0, result.output
    plain = model.logits(TOKENS)
    moved = model.logits(TOKENS, law=law_of(fitted, 2.0), steer_all=True) - plain
    with loaded(file) as (_, context):
        theirs = logits(context)
        assert np.allclose(theirs, plain, atol=2e-3 * np.abs(plain).max())
        applied(context, vector, model.num_layers)
        error = np.linalg.norm(logits(context) - theirs - moved) / np.linalg.norm(moved)
        applied(context, vector, model.num_layers, shifted=1)
        wrong = np.linalg.norm(logits(context) - theirs - moved) / np.linalg.norm(moved)
    assert error < 0.01
    assert wrong > 0.1
