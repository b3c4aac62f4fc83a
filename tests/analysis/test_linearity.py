"""Spectra, their alignment, the linearisation error and the trust region, each against another way of getting it."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.by_hand import shifted_output
from helpers.controllers import controller_for
from helpers.prompts import NOMINAL_PROMPT as PROMPT
from helpers.prompts import NOMINAL_PROMPTS as PROMPTS
from helpers.tiny import FAMILY, tiny

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.analysis import linearity, monitored
from mlx_lqr.analysis.inputs import default_prompts
from mlx_lqr.analysis.linearity import TOLERANCE, displacement_error, linearisation_error, trust_region
from mlx_lqr.analysis.rollout import roll_out
from mlx_lqr.analysis.spectra import (
    dominant_modes,
    gaussian_modes,
    mean_of_pairs,
    rotated,
    similarity_matrix,
    spectral_similarity,
)
from mlx_lqr.backends.protocol import Model
from mlx_lqr.lqr.controller import Positions
from mlx_lqr.methods.alqr import LinearFeedback


@pytest.mark.parametrize("family", sorted(FAMILY))
def test_a_block_is_run_as_the_model_runs_it(family: str, random: np.random.Generator) -> None:
    model = tiny(family)
    trace = model.trace(PROMPT)
    for layer in range(model.num_layers):
        steps = 0.3 * random.standard_normal((3, model.hidden_size)).astype(np.float32)
        values = model.block(trace, layer, trace.residual[layer] + np.vstack([0 * steps[:1], steps]))
        assert np.allclose(values[0], model.block(trace, layer, trace.residual[[layer]])[0], atol=1e-5)
        for step, value in zip(steps, values[1:], strict=True):
            assert np.allclose(value, shifted_output(model, PROMPT, layer, step), atol=1e-5), layer


def test_a_quantised_block_is_run_as_its_unpacked_self(random: np.random.Generator) -> None:
    model = tiny("llama")
    nn.quantize(model.module, group_size=32, bits=4)
    trace = model.trace(PROMPT)
    step = random.standard_normal(model.hidden_size).astype(np.float32)
    value = model.block(trace, 1, (trace.residual[1] + step)[None])[0]
    assert np.allclose(value, shifted_output(model, PROMPT, 1, step), atol=1e-4)
    assert model.block(trace, 1, np.empty((0, 32), np.float32)).shape == (0, 32)


def by_definition(W: np.ndarray, X: np.ndarray, m: int) -> float:
    """sim_m of two matrices, written out."""
    modes = []
    for matrix in (W, X):
        U, S, _ = np.linalg.svd(matrix)
        modes.append((U[:, :m], np.diag(S[:m])))
    (U_W, S_W), (U_X, S_X) = modes
    nuclear = np.linalg.norm((U_W @ S_W).T @ (U_X @ S_X), ord="nuc")
    return float(nuclear / (np.linalg.norm(S_W) * np.linalg.norm(S_X)))


@pytest.mark.parametrize("m", [1, 3, 12])
def test_similarity_is_that_of_the_paper(m: int, random: np.random.Generator) -> None:
    W, X = random.standard_normal((2, 12, 12))
    scaled = [dominant_modes(matrix, m)[1] for matrix in (W, X)]
    assert spectral_similarity(*scaled) == pytest.approx(by_definition(W, X, m))
    assert spectral_similarity(scaled[0], scaled[0]) == pytest.approx(1)
    assert 0 <= spectral_similarity(*scaled) <= 1
    basis, _ = np.linalg.qr(random.standard_normal((24, 24)))
    assert spectral_similarity(basis[:, :m], basis[:, m : 2 * m]) == pytest.approx(0, abs=1e-12)
    assert spectral_similarity(0 * scaled[0], scaled[1]) == 0
    turned = similarity_matrix([scaled[0], -scaled[0], 3 * scaled[0]], m)
    assert np.allclose(turned, 1)  # neither sign nor size matters


def test_random_matrices_are_the_baseline(random: np.random.Generator) -> None:
    """For one mode the expected |cosine| of two directions in d dimensions is sqrt(2 / (pi d))."""
    d, expected = 30, np.sqrt(2 / (np.pi * 30))
    gaussian = [gaussian_modes(d, 1, random) for _ in range(30)]
    assert mean_of_pairs(similarity_matrix(gaussian, 1)) == pytest.approx(expected, rel=0.1)
    scaled = gaussian_modes(d, 5, random)
    other = rotated(scaled, random)
    assert np.allclose(np.linalg.norm(other, axis=0), np.linalg.norm(scaled, axis=0))
    assert np.allclose(other.T @ other, np.diag(np.diag(other.T @ other)), atol=1e-9)
    assert np.isnan(mean_of_pairs(np.ones((1, 1))))


def test_the_error_falls_in_proportion_to_the_step(random: np.random.Generator) -> None:
    """The remainder is of second order: against float64 finite differences of the block as mlx-lm runs it."""
    model, exact = tiny("qwen3"), tiny("qwen3", dtype=mx.float64)
    trace = model.trace(PROMPT)
    w = random.standard_normal(model.hidden_size).astype(np.float32)
    w /= np.linalg.norm(w)
    sizes = np.array([0.05, 0.1, 0.2, 0.4], np.float32)
    error = linearisation_error(model, trace, 1, w[None], sizes)
    assert error[1:] / error[:-1] == pytest.approx(2, rel=0.3)
    A = model.jacobian(trace, 1)
    with mx.stream(mx.cpu):
        at_rest = shifted_output(exact, PROMPT, 1, 0 * w)
        for size, measured in zip(sizes, error, strict=True):
            remainder = shifted_output(exact, PROMPT, 1, size * w) - at_rest - A @ (size * w)
            assert measured == pytest.approx(np.linalg.norm(remainder) / np.linalg.norm(A @ (size * w)), rel=0.05)
    steps = sizes[:, None] * w
    assert displacement_error(model, trace, 1, trace.residual[1], steps) == pytest.approx(error, rel=1e-2)
    assert np.isnan(displacement_error(model, trace, 1, trace.residual[1], 0 * steps)).all()
    both = linearisation_error(model, trace, 1, np.stack([w, -w]), sizes)
    assert np.allclose(both, np.maximum(error, linearisation_error(model, trace, 1, -w[None], sizes)), rtol=1e-3)


def test_the_trust_region_ends_where_the_error_passes_ten_per_cent() -> None:
    sizes = np.array([0.01, 0.1, 1.0, 10.0], np.float32)
    curves = np.array([sizes / 3, sizes * 100, sizes / 1e6, np.full(4, np.nan), [0.01, 0.5, 0.05, 0.01]], np.float32)
    radius = trust_region(sizes, curves)
    assert radius[0] == pytest.approx(3 * TOLERANCE)
    assert radius[1] == pytest.approx(TOLERANCE / 100)  # below the smallest size
    assert np.isinf(radius[2])
    assert np.isnan(radius[3])
    assert 0.01 < radius[4] < 0.1  # the first passage counts
    assert trust_region(sizes, curves.reshape(1, 5, 4)).shape == (1, 5)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_a_rollout_is_the_model_steered(positions: Positions) -> None:
    model = tiny("gemma3_text")
    controller, strengths = controller_for(model, positions=positions), (1.0, -2.0)
    run = roll_out(model, PROMPT, controller, strengths)
    for s, strength in enumerate(strengths):
        law = LinearFeedback(controller, strength)
        expected = model.residuals([PROMPT], law=law, steer_all=positions == "all")[0]
        assert np.allclose(run.steered[s], expected, atol=1e-4)
        alpha = (
            controller.offset
            + strength * controller.setpoint
            - np.einsum("kdm,kd->km", controller.sensor, expected[:-1])
        )
        assert np.allclose(run.feature_error[s], alpha[:, 0], atol=1e-4)
        pushed = [law(k, expected[k], np.zeros(32, np.float32)) if k in law.layers else np.zeros(32) for k in range(3)]
        assert np.allclose(run.push[s], np.linalg.norm(pushed, axis=1), atol=1e-4)
    if positions == "last":
        assert np.allclose(run.unsteered, model.residuals([PROMPT]), atol=1e-4)
    assert np.abs(run.steered - run.unsteered).max() > 0.01


def test_linearity_of_a_small_model() -> None:
    model = tiny("llama")
    controller = controller_for(model, layers=[0, 1])
    reported: list[tuple[str, int, int]] = []
    measured = linearity(
        model, PROMPTS, controller, strengths=(1.0, 4.0), modes=4, progress=lambda *step: reported.append(step)
    )
    n, T = 4, 3
    singular = np.stack(
        [[np.linalg.svd(mlx_lqr.linearize(model, [p])[k], compute_uv=False) for p in PROMPTS] for k in range(T)]
    )
    assert measured.singular_values[1] == pytest.approx(np.median(singular, axis=1), rel=1e-3, abs=1e-4)
    assert np.all(measured.singular_values[0] <= measured.singular_values[2])
    pair = [mlx_lqr.linearize(model, [p])[2] for p in PROMPTS[:2]]
    assert measured.similarity[2, 0, 1] == pytest.approx(by_definition(pair[0], pair[1], 4), rel=1e-3)
    j = measured.mode_counts.index(4)
    assert measured.similarity_by_modes[2, j] == pytest.approx(mean_of_pairs(measured.similarity[2]), rel=1e-3)
    assert measured.error["concept"].shape == (n, T, len(measured.sizes))
    assert np.isnan(measured.error["push"][:, 0]).all()  # nothing is pushed before layer 0
    assert not np.isnan(measured.error["push"][:, 1:]).any()
    assert measured.trust_radius("random").shape == (T,)
    norms = np.linalg.norm(model.residuals(PROMPTS)[:, :-1], axis=2)
    assert measured.norm == pytest.approx(norms, rel=1e-4)
    assert measured.applied is not None
    assert np.isnan(measured.applied.displacement_error[:, :, 0]).all()
    assert np.all(measured.applied.displacement[:, 1, 1:] > 0)
    assert np.all(measured.applied.displacement[:, :, 0] == 0)
    assert reported[T * n - 1] == ("Layers", T * n, T * n)
    alone = linearity(model, PROMPTS)
    assert set(alone.error) == {"random"}
    assert alone.applied is None


def test_the_region_goes_into_the_controller_and_with_it(tmp_path: Path) -> None:
    model = tiny("llama")
    controller = controller_for(model, layers=[0, 1])
    measured = linearity(model, PROMPTS, controller)
    region = monitored(controller, measured)
    assert region.checked_error is not None
    assert region.checked_push is not None
    fed_back = np.quantile(measured.trust["concept"][:, 1] * measured.norm[:, 1], 0.1, method="lower")
    assert np.allclose(controller.shares[0] * region.checked_error[1], fed_back)
    assert np.allclose(region.checked_push[0], measured.trust_radius("push", 0.1)[1])
    assert np.isinf(region.checked_push[-1])  # no block comes after the last
    region.save(tmp_path / "a.safetensors")
    loaded = mlx_lqr.Controller.load(tmp_path / "a.safetensors")
    assert np.array_equal(loaded.checked_push, region.checked_push)  # type: ignore[arg-type]
    both = mlx_lqr.Controller.combine(loaded, controller_for(model, "b"))
    assert both.checked_error is not None
    assert np.array_equal(both.checked_error[:, 0], region.checked_error[:, 0])
    assert np.isinf(both.checked_error[:, 1]).all()
    first, second = both.split()
    assert np.array_equal(first.checked_error, region.checked_error)  # type: ignore[arg-type]
    assert mlx_lqr.Controller.combine(controller_for(model), controller_for(model, "b")).checked_error is None
    with pytest.raises(InputError, match="another controller: give the same one to both"):
        monitored(second, measured)


def test_what_cannot_be_measured_is_refused(smollm2: Model) -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match="at least two"):
        linearity(model, [PROMPT])
    both = mlx_lqr.Controller.combine(controller_for(model), controller_for(model, "b"))
    with pytest.raises(InputError, match="one concept at a time"):
        linearity(model, PROMPTS, both)
    with pytest.raises(InputError, match="fitted on"):
        linearity(tiny("llama", seed=1), PROMPTS, controller_for(model))


def test_default_prompts_end_in_different_tokens(smollm2: Model) -> None:
    prompts = default_prompts(16, ["dog"])
    assert len(set(prompts)) == 16
    last = {smollm2.tokenizer.encode(prompt)[-1] for prompt in prompts}
    assert len(last) > 12
    own = {" ".join(text.split()[:3]) for text in mlx_lqr.bundled_prompts("dog")[1]}
    assert not own & {" ".join(prompt.split()[:3]) for prompt in prompts}
