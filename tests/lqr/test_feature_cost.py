"""The low-rank sweep of the feature cost, and controllers adapted to the prompt in hand."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
import numpy as np
import pytest
from helpers.prompts import NOMINAL_PROMPT as PROMPT
from helpers.tiny import FAMILY, tiny

import mlx_lqr
from mlx_lqr import Controller, InputError
from mlx_lqr.backends.protocol import Model
from mlx_lqr.lqr.gains import Push
from mlx_lqr.lqr.riccati import Weights, feature_sweep


def dense(
    jacobians: Any, V: np.ndarray, mu: np.ndarray, weights: Weights, layers: set[int], *, free: bool = True
) -> np.ndarray:
    """g_k by the textbook recursion in float64 with the same d x d weights, for B = I or B = v_{k+1}."""
    T, d = len(jacobians), V.shape[1]
    S = weights.qf / mu[T] ** 2 * np.outer(V[T], V[T])
    gains = np.zeros((T, d))
    for k in reversed(range(T)):
        A = np.asarray(jacobians[k], np.float64)
        Q = weights.q / mu[k] ** 2 * np.outer(V[k], V[k]) if mu[k] > 0 else np.zeros((d, d))
        K = np.zeros((d, d))
        if k in layers:
            B = np.eye(d) if free else V[k + 1][:, None]
            R = weights.r / mu[k + 1] ** 2 * np.eye(B.shape[1])
            K = B @ np.linalg.solve(B.T @ S @ B + R, B.T @ S @ A)
        S = Q + A.T @ S @ (A - K)
        S = (S + S.T) / 2
        gains[k] = K @ V[k]
    return gains


def closest(gains: np.ndarray, expected: np.ndarray) -> float:
    rows = np.linalg.norm(expected, axis=1) > 0
    return float((np.linalg.norm(gains - expected, axis=1)[rows] / np.linalg.norm(expected, axis=1)[rows]).max())


@pytest.mark.parametrize("weights", [Weights(0.1, 1, 0.1), Weights(10, 1, 0), Weights(0, 1, 3)])
@pytest.mark.parametrize("layers", [{0, 1, 2, 3, 4, 5}, {2, 5}])
@pytest.mark.parametrize("free", [True, False])
def test_equals_the_dense_recursion(
    weights: Weights, layers: set[int], free: bool, random: np.random.Generator
) -> None:
    T, d = 6, 10
    jacobians = [np.eye(d) + random.standard_normal((d, d)) / 3 for _ in range(T)]
    V = random.standard_normal((T + 1, d))
    V /= np.linalg.norm(V, axis=1, keepdims=True)
    mu = random.uniform(0.5, 5, T + 1)
    V[0], mu[0] = 0, 0
    sweep = feature_sweep(lambda k, X: jacobians[k].T @ X, V, mu, weights, layers, pushes=None if free else V[1:])
    gains = np.zeros((T, d))
    for k, gain in sweep:
        gains[k] = gain
    expected = dense(jacobians, V, mu, weights, layers, free=free)
    assert np.allclose(gains, expected, rtol=1e-9, atol=1e-12)
    assert expected.any()


@pytest.mark.parametrize("push", ["concept", "free"])
def test_equals_the_dense_recursion_on_smollm2(
    smollm2: Model, golden: dict[str, Any], jacobians: mlx_lqr.Jacobians, push: Push
) -> None:
    prompts = golden["positive"], golden["negative"]
    options: dict[str, Any] = {"layers": "all", "feedback": 1.0, "push": push}
    fitted = mlx_lqr.fit(smollm2, *prompts, cost="feature", jacobian_prompts=3, **options)
    contrast = mlx_lqr.contrast(smollm2, *prompts)
    V = np.vstack([contrast.unit_direction, contrast.output_direction / contrast.output_magnitude])
    mu, free = np.append(contrast.magnitude, contrast.output_magnitude), push == "free"
    expected = dense(jacobians, V, mu, Weights(), set(range(30)), free=free)
    assert golden["positive"][:3] == golden["jacobian_prompts"]
    assert closest(fitted.gain[:, :, 0], expected) < 1e-5
    stored = mlx_lqr.fit(smollm2, *prompts, cost="feature", jacobians=jacobians, **options)
    assert closest(stored.gain[:, :, 0], expected) < 1e-5
    assert fitted.cost == "feature"


@pytest.mark.parametrize("family", sorted(FAMILY))
def test_products_are_those_of_the_jacobian(family: str, random: np.random.Generator) -> None:
    model = tiny(family)
    trace = model.trace(PROMPT)
    X = random.standard_normal((5, model.hidden_size)).astype(np.float32)
    for k in range(model.num_layers):
        A = model.jacobian(trace, k)
        assert np.allclose(model.jvp(trace, k, X), X @ A.T, atol=1e-4 * np.abs(A).max())
        assert np.allclose(model.vjp(trace, k, X), X @ A, atol=1e-4 * np.abs(A).max())


@pytest.mark.parametrize("bits", [4, 8])
def test_on_quantised_models(bits: int) -> None:
    model = tiny("llama")
    nn.quantize(model.module, group_size=32, bits=bits)
    prompts = [[1, 2, 3], [4, 5, 6]], [[7, 8, 9]]
    low_rank = mlx_lqr.fit(model, *prompts, cost="feature", layers="all")
    stored = mlx_lqr.fit(model, *prompts, cost="feature", jacobians=mlx_lqr.linearize(model, prompts[0]), layers="all")
    assert closest(low_rank.gain[:, :, 0], stored.gain[:, :, 0].astype(np.float64)) < 1e-4


def test_no_matrix_of_the_jacobians_size_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    rows: list[int] = []
    products = model._differentiate

    def counted(product: Any, trace: Any, layer: int, directions: np.ndarray) -> np.ndarray:
        rows.append(len(directions))
        return products(product, trace, layer, directions)

    monkeypatch.setattr(model, "_differentiate", counted)
    mlx_lqr.fit(model, [[1, 2, 3]], [[7, 8, 9]], cost="feature", layers="all")
    assert max(rows) <= model.num_layers


def test_adapting_is_fitting_at_the_prompt() -> None:
    model = tiny("qwen3")
    positive, negative = [[1, 2, 3], [4, 5, 6]], [[7, 8, 9]]
    contrast = mlx_lqr.contrast(model, positive, negative)
    adapted = mlx_lqr.adapt(model, contrast, PROMPT, q=1.0, qf=0.5, layers=[1, 2])
    at_prompt = mlx_lqr.linearize(model, [PROMPT])
    expected = mlx_lqr.fit(model, positive, negative, q=1.0, qf=0.5, layers=[1, 2], cost="feature", jacobians=at_prompt)
    assert closest(adapted.gain[:, :, 0], expected.gain[:, :, 0].astype(np.float64)) < 1e-4
    assert adapted.active_layers == (1, 2)


def test_a_saved_controller_adapts_as_its_contrast_does(tmp_path: Any) -> None:
    model = tiny("llama")
    sets = {"a": ([[1, 2, 3], [4, 5, 6]], [[7, 8, 9]]), "b": ([[10, 11]], [[12, 13], [14, 15]])}
    fitted = [mlx_lqr.fit(model, *prompts, concept=name, q=1.0, layers="all") for name, prompts in sets.items()]
    Controller.combine(*fitted).save(tmp_path / "both.safetensors")
    adapted = mlx_lqr.adapt(model, Controller.load(tmp_path / "both.safetensors"), PROMPT)
    expected = Controller.combine(
        *(
            mlx_lqr.adapt(model, mlx_lqr.contrast(model, *prompts), PROMPT, q=1.0, layers="all", concept=name)
            for name, prompts in sets.items()
        )
    )
    assert adapted.concepts == ("a", "b")
    assert np.allclose(adapted.gain, expected.gain, rtol=1e-3, atol=1e-4)
    assert np.array_equal(adapted.setpoint, expected.setpoint)


def test_splitting_undoes_combining() -> None:
    model = tiny("llama")
    fitted = [
        mlx_lqr.fit(model, [[1, 2, 3]], [[7, 8, 9]], concept="a", layers="all"),
        mlx_lqr.fit(model, [[10, 11]], [[12, 13]], concept="b", layers=[1]),
    ]
    for one, back in zip(fitted, Controller.combine(*fitted).split(), strict=True):
        assert back.concepts == one.concepts
        assert np.allclose(back.gain, one.gain, atol=1e-4 * np.abs(one.gain).max())


def test_what_does_not_fit_is_refused() -> None:
    model, other = tiny("llama"), tiny("llama", seed=1)
    sets = [[1, 2, 3]], [[7, 8, 9]]
    with pytest.raises(InputError, match="cost must be"):
        mlx_lqr.fit(model, *sets, cost="both", layers="all")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not of"):
        mlx_lqr.adapt(other, mlx_lqr.contrast(model, *sets), PROMPT)
    with pytest.raises(InputError, match="fitted on"):
        mlx_lqr.adapt(other, mlx_lqr.fit(model, *sets, layers="all"), PROMPT)
