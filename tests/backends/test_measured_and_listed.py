"""A real model of a family on the list, measured as if it were on none: every number is that of the faster way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.decoding import tokens

import mlx_lqr
from mlx_lqr.backends.checkpoint.model_folder import read_config
from mlx_lqr.backends.measurement import EXACT
from mlx_lqr.backends.mlx import measurement as measuring
from mlx_lqr.backends.mlx.measured_model import MeasuredModel, load_measured
from mlx_lqr.backends.protocol import Model

TEXT = "Salt from the ocean dried on his skin as he walked along the beach."
LAYERS = range(26, 30)


@pytest.fixture(scope="module")
def measured(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeasuredModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_LQR_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(measuring, "DIRECTIONS", 2)  # enough for a model that is known to be right
        patch.setattr(measuring, "LAYERS", 2)
        yield load_measured(smollm2_folder, read_config(smollm2_folder), "smollm2", None)


def test_a_listed_model_is_measured_as_exact(measured: MeasuredModel, smollm2: Model) -> None:
    of = measured.measurement
    assert max(of.steps, of.jacobian, of.chain) < EXACT / 5
    assert of.merges
    assert not of.differences
    assert (measured.fingerprint, measured.context_length) == (smollm2.fingerprint, smollm2.context_length)


def test_residuals_and_jacobians(measured: MeasuredModel, smollm2: Model) -> None:
    prompts = [smollm2.tokenizer.encode(TEXT), smollm2.tokenizer.encode("The")]
    expected = smollm2.residuals(prompts)
    assert np.abs(measured.residuals(prompts) - expected).max() < 1e-5 * np.abs(expected).max()
    trace, other = smollm2.trace(prompts[0]), measured.trace(prompts[0])
    for layer in (0, 29):
        A = smollm2.jacobian(trace, layer)
        assert np.linalg.norm(measured.jacobian(other, layer) - A) < 1e-4 * np.linalg.norm(A)


@pytest.mark.parametrize("cost", ["state", "feature"])
def test_gains_and_steered_tokens(cost: str, measured: MeasuredModel, smollm2: Model) -> None:
    prompts = [texts[:2] for texts in mlx_lqr.bundled_prompts("ocean")]
    one, other = (mlx_lqr.fit(model, *prompts, layers=LAYERS, cost=cost) for model in (smollm2, measured))
    assert np.abs(other.gain - one.gain).max() < 1e-4 * np.abs(one.gain).max()
    options = {"controller": one, "strength": 1.5, "max_tokens": 8, "temperature": 0}
    expected = [tokens(mlx_lqr.stream(model, TEXT, **options)) for model in (smollm2, measured)]
    assert expected[0] == expected[1]


def test_logits_along_a_prompt(measured: MeasuredModel, smollm2: Model) -> None:
    tokens = smollm2.tokenizer.encode(TEXT)
    decoder = measured.decoder()
    parts = [decoder.logits_along(part, steered=False) for part in (tokens[:5], tokens[5:])]
    (expected,) = smollm2.logits_along([(tokens[:1], tokens[1:])])
    assert np.abs(np.concatenate(parts) - expected).max() < 1e-4 * np.abs(expected).max()
