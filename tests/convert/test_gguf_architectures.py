"""Every architecture that converts from GGUF computes what transformers and mlx-lm compute with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind
from helpers.tiny_gguf import FURTHER, VOCABULARY, logits, write
from mlx_lm.utils import load_model

import mlx_lqr
from mlx_lqr.convert import convert

PROMPT = np.random.default_rng(7).integers(0, VOCABULARY, 48).tolist()
K_SIZES = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "head_dim": 64}


def mlx_logits(folder: Path) -> np.ndarray:
    """The logits of mlx-lm's own class."""
    model, _ = load_model(folder)
    return np.array(model(mx.array([PROMPT]))[0].astype(mx.float32))


def our_logits(folder: Path, backend: Any = "mlx") -> np.ndarray:
    model = mlx_lqr.load(folder, backend=backend)
    return np.asarray(model.logits_along([(PROMPT[:1], PROMPT[1:])])[0])


@pytest.mark.parametrize("arch", FURTHER)
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_K])
def test_logits_equal_transformers_with_the_same_weights(arch: str, kind: Kind, tmp_path: Path) -> None:
    sizes = {key: size for key, size in K_SIZES.items() if key != "moe_intermediate_size" or arch == "qwen3moe"}
    tiny = write(tmp_path / "tiny.gguf", arch, kind, **(sizes if kind == Kind.Q4_K else {}))
    folder = convert(tiny.path, tmp_path / "out", dtype="float32")
    expected = logits(tiny.reference, PROMPT)
    assert np.abs(expected).max() > 1
    print(arch, kind.name, np.abs(our_logits(folder) - expected).max(), np.abs(mlx_logits(folder) - expected).max())
    np.testing.assert_allclose(our_logits(folder), expected, atol=1e-3)
    np.testing.assert_allclose(mlx_logits(folder), expected, atol=5e-3 if arch == "gemma" else 1e-3)
