"""The whole path on the real SmolLM2, on every backend, against an independent PyTorch implementation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.backends import BACKENDS, smollm2_on

import mlx_lqr
from mlx_lqr.backends.protocol import Model
from mlx_lqr.methods.running import law_on


@pytest.fixture(scope="module", params=BACKENDS)
def smollm2(request: pytest.FixtureRequest) -> Model:
    return smollm2_on(request.param)


@pytest.fixture(scope="module")
def ocean(smollm2: Model, golden: dict[str, Any]) -> mlx_lqr.Contrast:
    return mlx_lqr.contrast(smollm2, golden["positive"], golden["negative"])


@pytest.fixture(scope="module")
def jacobians(smollm2: Model, golden: dict[str, Any]) -> mlx_lqr.Jacobians:
    return mlx_lqr.linearize(smollm2, golden["jacobian_prompts"])


@pytest.fixture(scope="module")
def controller(jacobians: mlx_lqr.Jacobians, ocean: mlx_lqr.Contrast) -> mlx_lqr.Controller:
    return mlx_lqr.compile(
        mlx_lqr.solve(jacobians, 0.1, 1.0, 0.1), ocean, "ocean", setpoint="paper", readout="direction", feedback=1.0
    )


def relative(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


def test_direction(ocean: mlx_lqr.Contrast, golden: dict[str, Any]) -> None:
    assert not ocean.direction[0].any()
    assert relative(ocean.direction[1:], golden["direction"][1:]).max() < 1e-4
    assert relative(ocean.mean_positive, golden["mean_positive"]).max() < 1e-4
    assert relative(ocean.mean_negative, golden["mean_negative"]).max() < 1e-4


def test_jacobians(jacobians: mlx_lqr.Jacobians, golden: dict[str, Any]) -> None:
    A = np.stack(list(jacobians))
    w = golden["probe"]
    assert relative(np.einsum("kij,kj->ki", A, w), golden["jacobian_times_probe"]).max() < 1e-4
    assert relative(np.einsum("kji,kj->ki", A, w), golden["jacobian_transpose_times_probe"]).max() < 1e-4
    assert np.allclose(np.linalg.norm(A, axis=(1, 2)), golden["jacobian_frobenius"], rtol=1e-4)


@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0])
def test_gains(weight: float, jacobians: mlx_lqr.Jacobians, ocean: mlx_lqr.Contrast, golden: dict[str, Any]) -> None:
    gains = mlx_lqr.solve(jacobians, weight, 1.0, weight)
    g = np.stack([gains.apply(k, v) for k, v in enumerate(ocean.unit_direction)])
    assert relative(g[1:], golden[f"gain_direction/q{weight}_r1.0_qf{weight}"][1:]).max() < 1e-4


def test_logits_and_tokens_unsteered(smollm2: Model, golden: dict[str, Any]) -> None:
    tokens = smollm2.tokenizer.encode(golden["prompt"])
    assert tokens == golden["tokens"]["prompt"]
    assert np.abs(smollm2.logits(tokens) - golden["logits_unsteered"]).max() < 2e-3
    assert [piece.token for piece in mlx_lqr.stream(smollm2, tokens, max_tokens=40, temperature=0)] == golden["tokens"][
        "unsteered"
    ]


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("strength", [1.0, 3.0, -3.0])
def test_logits_and_tokens_steered(
    strength: float, positions: Any, smollm2: Model, controller: mlx_lqr.Controller, golden: dict[str, Any]
) -> None:
    name = f"q0.1_r1.0_qf0.1/strength{strength}/{positions}"
    steered = replace(controller, positions=positions)
    tokens = golden["tokens"]["prompt"]
    law = law_on(smollm2, steered, strength)
    logits = smollm2.logits(tokens, law=law, steer_all=positions == "all")
    assert np.abs(logits - golden[f"logits/{name}"]).max() < 2e-3
    pieces = mlx_lqr.stream(
        smollm2, golden["prompt"], controller=steered, strength=strength, max_tokens=40, temperature=0
    )
    agreed = 40 if positions == "last" else 10
    assert [piece.token for piece in pieces][:agreed] == golden["tokens"][name][:agreed]


def test_controller_file_is_small_and_steers_alike(
    tmp_path: Any, smollm2: Model, controller: mlx_lqr.Controller, golden: dict[str, Any]
) -> None:
    file = tmp_path / "ocean.safetensors"
    controller.save(file)
    assert file.stat().st_size < 150_000
    loaded = mlx_lqr.Controller.load(file)
    text = mlx_lqr.generate(smollm2, golden["prompt"], controller=loaded, strength=3.0, max_tokens=20, temperature=0)
    assert text == mlx_lqr.generate(
        smollm2, golden["prompt"], controller=controller, strength=3.0, max_tokens=20, temperature=0
    )
