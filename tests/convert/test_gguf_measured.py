"""Architectures that no list names come through GGUF as mlx-lm's own model computes them, whatever llama.cpp stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.gguf_cases import CASES
from helpers.gguf_written import logits, model_of, write_model
from helpers.tiny_gguf import VOCABULARY
from mlx_lm.utils import load_model

from mlx_lqr.convert import convert

PROMPT = np.random.default_rng(7).integers(0, VOCABULARY, 24).tolist()


def converted(file: Path, **options: Any) -> Path:
    return convert(file, file.parent / "out", dtype="float32", **options)


def check(file: Path, expected: np.ndarray) -> None:
    model, _ = load_model(converted(file))
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits(model, PROMPT), expected, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_model_that_was_written(name: str, tmp_path: Path) -> None:
    model = model_of(CASES[name])
    check(write_model(tmp_path / "tiny.gguf", CASES[name], model), logits(model, PROMPT))
