"""Blocks that hand on more than the residual stream: what they share is a part of the state, and the chain is exact."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.architectures import CONFIGS, SHARING, by_hand, model_of, module_of
from helpers.controllers import NEGATIVE, POSITIVE, controller_for
from mlx_lm.models.cache import make_prompt_cache

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.analysis.certificate import certify
from mlx_lqr.analysis.linearity import linearity
from mlx_lqr.backends.measurement import EXACT
from mlx_lqr.backends.mlx.copying import copied
from mlx_lqr.backends.mlx.frozen import in_float32
from mlx_lqr.backends.mlx.measured_decoder import FrozenTrace
from mlx_lqr.backends.mlx.measured_model import MeasuredModel
from mlx_lqr.backends.mlx.shared import Call, shared_by
from mlx_lqr.lqr.gains import Push
from mlx_lqr.lqr.riccati import Weights, cost_to_go

PROMPT = [5, 9, 2, 33, 7, 51, 20, 11, 3]
sharing = pytest.mark.parametrize("family", SHARING)
HANDED_ON = {"gemma4_text": 32, "gemma4": 32, "hunyuan": 32, "gemma3n": 32, "rwkv7": 64}
"""m of the tiny models: keys and values of one head for the two kinds of layers; keys and values of two heads, of one
pair of layers at a time; one value."""


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """So that nothing measured by another version counts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_LQR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@functools.cache
def trace_of(family: str) -> FrozenTrace:
    trace: FrozenTrace = model_of(family).trace(PROMPT)
    return trace


@functools.cache
def jacobians_of(family: str) -> list[np.ndarray]:
    model = model_of(family)
    return [model.jacobian(trace_of(family), k).astype(np.float64) for k in range(model.num_layers)]


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def response(model: MeasuredModel, moves: np.ndarray) -> np.ndarray:
    """d z_T / d z_0 w at the last token for rows w (n, d), by differences of mlx-lm's own pass of the whole prompt."""
    size = 3e-4 * float(np.linalg.norm(model.trace(PROMPT).residual[0])) / model.hidden_size**0.5
    shifts = mx.array(np.concatenate([size * moves, -size * moves]))[:, None]
    normal, native = (0, 1, 2), (0, 1, 2)
    streams = len(model.layout.features) > 1  # (streams, B, L, features)
    if streams:
        normal, native = (1, 2, 0, 3), (2, 0, 1, 3)  # type: ignore[assignment]
        shifts = shifts.reshape(*shifts.shape[:2], *model.layout.features).transpose(native)
    ends: list[mx.array] = []

    def push(k: int, z: mx.array) -> mx.array:
        axis = 2 if streams else 1
        before, last = mx.split(z, [len(PROMPT) - 1], axis=axis)
        return mx.concatenate([before, last + shifts], axis=axis) if k == 0 else z

    def record(k: int, z: mx.array, output: mx.array) -> mx.array:
        if k == model.num_layers - 1:
            ends.append(output.transpose(normal)[:, -1].reshape(len(shifts) if not streams else shifts.shape[1], -1))
        return output

    with by_hand(model.blocks, record, push):
        mx.eval(model.module(mx.array([PROMPT] * (2 * len(moves))), cache=make_prompt_cache(model.module)))
    values = np.asarray(ends[0]).astype(np.float64)
    return (values[: len(moves)] - values[len(moves) :]) / (2 * size)


@sharing
def test_the_product_of_jacobians_is_the_response_of_the_whole_model(family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = model_of(family)
    assert max(model.measurement.jacobian, model.measurement.chain) < EXACT
    assert model.state_size - model.hidden_size == HANDED_ON[family]
    d, w = model.hidden_size, random(4, model.hidden_size)
    expected = response(model, w)
    rows, alone = np.pad(w, ((0, 0), (0, HANDED_ON[family]))), w
    for A in jacobians_of(family):
        rows, alone = rows @ A.T, alone @ A[:d, :d].T
    assert np.linalg.norm(rows[:, :d] - expected) < EXACT * np.linalg.norm(expected)
    assert not rows[:, d:].any()  # after the last block nobody reads it
    if family in ("gemma4_text", "hunyuan", "rwkv7"):
        assert np.linalg.norm(alone - expected) > EXACT * np.linalg.norm(expected)


@sharing
@pytest.mark.parametrize("length", [1, 5, len(PROMPT)])
def test_blocks_are_a_chain_within_and_beyond_a_window(family: str, length: int) -> None:
    model = model_of(family)
    trace = trace_of(family) if length == len(PROMPT) else model.trace(PROMPT[:length])
    for k in range(model.num_layers):
        after = model.block(trace, k, trace.state[k][None])[0]
        assert np.abs(after - trace.state[k + 1]).max() < 1e-5 * np.abs(trace.state).max()
    assert trace.nbytes > trace.residual.nbytes


@sharing
def test_jacobians_are_those_of_the_frozen_blocks(family: str) -> None:
    """On the side too, whose numbers are of another size than those of the residual stream."""
    model, trace = model_of(family), trace_of(family)
    d = model.hidden_size
    for k, A in enumerate(jacobians_of(family)):
        s, u = trace.state[k], random(4, model.state_size)
        scale = np.sqrt(np.mean(s[:d] ** 2))
        side = np.sqrt(np.mean(s[d:] ** 2)) or 1.0
        for w in (np.hstack([scale * u[:, :d], 0 * u[:, d:]]), np.hstack([0 * u[:, :d], side * u[:, d:]])):
            ahead, behind = (model.block(trace, k, s + sign * 1e-3 * w).astype(np.float64) for sign in (1, -1))
            expected, values = (ahead - behind) / 2e-3, w @ A.T
            assert np.linalg.norm(values - expected) <= EXACT * np.linalg.norm(expected)
        assert np.linalg.norm(model.vjp(trace, k, u) - u @ A) < 1e-4 * np.linalg.norm(u @ A)
        assert np.linalg.norm(model.jvp(trace, k, u) - u @ A.T) < EXACT * np.linalg.norm(u @ A.T)


def test_where_there_is_no_derivative_each_part_is_moved_by_its_own_size() -> None:
    trace = trace_of("rwkv7")
    A = jacobians_of("rwkv7")[2]
    by_differences = replace(trace.blocks[2], differences=True).jacobian(trace.state[2])
    assert np.linalg.norm(by_differences - A) < EXACT * np.linalg.norm(A)


def textbook(
    jacobians: list[np.ndarray],
    d: int,
    Q: list[np.ndarray],
    R: list[float],
    layers: tuple[int, ...],
    pushes: np.ndarray | None = None,
) -> list[np.ndarray]:
    """K_k (d, n) of the dense recursion with B = [I; 0], or [b_k; 0] for pushes (T, d); Q_k (d, d) for k = 0..T."""
    n = len(jacobians[0])
    S = np.zeros((n, n))
    S[:d, :d] = Q[-1]
    gains: list[np.ndarray] = []
    for k in reversed(range(len(jacobians))):
        A = jacobians[k]
        own = np.eye(d) if pushes is None else pushes[k][:, None]
        B = np.pad(own, ((0, n - d), (0, 0)))
        K = own @ np.linalg.solve(R[k] * np.eye(own.shape[1]) + B.T @ S @ B, B.T @ S @ A)
        K = K if k in layers else np.zeros((d, n))
        S = A.T @ S @ (A - np.pad(K, ((0, n - d), (0, 0))))
        S[:d, :d] += Q[k]
        gains.insert(0, K)
    return gains


@pytest.mark.parametrize(("family", "layers"), [("gemma4_text", [1, 2]), ("hunyuan", "all")])
@pytest.mark.parametrize("push", ["concept", "free"])
def test_gains_solve_the_regulator_of_the_whole_state(
    family: str, layers: str | list[int], push: Push, tmp_path: Path
) -> None:
    model = model_of(family)
    T, d, q, qf, r = model.num_layers, model.hidden_size, 2.0, 3.0, 0.5
    stored = mlx_lqr.linearize(model, POSITIVE, store=tmp_path / "jacobians.safetensors")
    jacobians, chosen = [np.asarray(A, np.float64) for A in stored], tuple(range(T)) if layers == "all" else (1, 2)
    contrast = mlx_lqr.contrast(model, POSITIVE, NEGATIVE)
    v, mu = contrast.unit_direction.astype(np.float64), np.append(contrast.magnitude, 0.0).astype(np.float64)
    mu[T] = np.linalg.norm(contrast.output_direction)
    v = np.vstack([v, contrast.output_direction / mu[T]])
    given = {"q": q, "qf": qf, "r": r, "layers": layers, "feedback": 1.0, "push": push}
    pushes = v[1:] if push == "concept" else None
    state = textbook(jacobians, d, [q * np.eye(d)] * T + [qf * np.eye(d)], [r] * T, chosen, pushes)
    weights = [q / mu[k] ** 2 if k < T else qf / mu[T] ** 2 for k in range(T + 1)]
    outer = [weight * np.outer(v[k], v[k]) for k, weight in enumerate(weights)]
    feature = textbook(jacobians, d, outer, [r / mu[k + 1] ** 2 for k in range(T)], chosen, pushes)
    for cost, gains in (("state", state), ("feature", feature)):
        expected = np.stack([K[:, :d] @ v[k] for k, K in enumerate(gains)])
        for options in ({"jacobians": stored}, {"jacobian_prompts": 2}) if cost == "feature" else ({},):
            controller = mlx_lqr.fit(model, POSITIVE, NEGATIVE, cost=cost, **given, **options)  # type: ignore[arg-type]
            assert np.linalg.norm(controller.gain[:, :, 0] - expected) < 1e-4 * np.linalg.norm(expected)
    if push == "concept":
        return
    full = mlx_lqr.solve(mlx_lqr.Jacobians.load(tmp_path / "jacobians.safetensors"), q, r, qf, layers=chosen)
    assert all(np.allclose(K, other, rtol=1e-6, atol=1e-9) for K, other in zip(full, state, strict=True))
    compiled = mlx_lqr.compile(full, contrast, feedback=1.0).gain[:, :, 0]
    assert np.allclose(compiled, np.stack([K[:, :d] @ v[k] for k, K in enumerate(state)]), rtol=1e-4, atol=1e-6)


def test_adaptive_gains_are_those_of_the_prompt() -> None:
    model = model_of("hunyuan")
    controller = controller_for(model, cost="feature", jacobian_prompts=1)
    adapted = mlx_lqr.adapt(model, controller, POSITIVE[0])
    assert np.allclose(adapted.gain, controller.gain, rtol=1e-3, atol=1e-5)
    other = mlx_lqr.adapt(model, controller, PROMPT)
    assert not np.allclose(other.gain, controller.gain, rtol=1e-2)


def test_a_small_push_does_what_is_predicted() -> None:
    """Through the keys and values that later layers share, too; sizes of what a controller does are those of z."""
    model = model_of("hunyuan")
    controller = controller_for(model, cost="state", readout="direction")
    small = replace(controller, gain=1e-3 * controller.gain)
    certificate = certify(model, small, POSITIVE[:1], NEGATIVE[:1], strengths=(1.0,), full_state=True)
    moved = np.abs(certificate.feature - certificate.unsteered).max()
    assert 0 < np.abs(certificate.predicted - certificate.feature).max() < 2e-2 * moved
    assert certificate.full_state is not None
    measured = linearity(model, POSITIVE, small, strengths=(1.0,))
    assert measured.singular_values.shape[2] == model.hidden_size
    assert measured.applied is not None
    assert np.nanmax(measured.applied.displacement_error) < 2e-2


def test_models_that_share_nothing_are_as_they_were() -> None:
    """To the bit: one reverse pass through the block alone."""
    model = model_of("qwen3_next")
    trace: FrozenTrace = model.trace(PROMPT)
    assert model.state_size == model.hidden_size == trace.state.shape[1]
    rows = mx.array(random(3, model.hidden_size))
    for k, block in enumerate(trace.blocks):

        def run(z: mx.array, block=block) -> mx.array:  # type: ignore[no-untyped-def]
            args, kwargs = copied((block.args, block.kwargs), len(rows), 0, mx.float32)
            return block.block(z[:, None], *args[1:], **kwargs)[:, 0]

        states = mx.broadcast_to(mx.array(trace.residual[k]), rows.shape)
        with in_float32(block.block):
            expected = np.asarray(mx.vjp(run, [states], [rows])[1][0])
        assert np.array_equal(model.vjp(trace, k, np.asarray(rows)), expected)
    A = [np.asarray(model.jacobian(trace, k)) for k in range(2)]
    whole, first = (list(cost_to_go([(1, A[1]), (0, A[0])], Weights(), (0, 1), width=width)) for width in (None, 32))
    for one, other in zip(whole, first, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


def test_what_no_later_block_reads_is_not_in_the_state() -> None:
    """Every block returns its keys and values, and none is called with those of another."""
    model = MeasuredModel(module_of("gemma4_text", num_kv_shared_layers=0), CONFIGS["gemma4_text"], "apart")
    assert model.state_size == model.hidden_size


def test_what_does_not_move_with_the_state_is_not_in_it() -> None:
    """Nor is what moves at some places and not at others."""
    keys, mask = mx.zeros((1, 2, 3, 4)), mx.zeros((1, 3))
    calls = [Call({}, {"keys": (0,), "mask": (1,)}), Call({"keys": keys, "mask": mask}, {})]
    moving = mx.zeros((2, 2, 3, 4))
    moving[1, :, 2] = 1.0
    shared, side = shared_by(calls, lambda k: {(0,): moving, (1,): mx.zeros((2, 3))})
    assert side.shape == (3, 8)
    assert [len(part.reads) for part in shared] == [0, 1]
    moving[1] = 0.0
    moving[1, 1, 2] = 1.0
    assert shared_by(calls, lambda k: {(0,): moving, (1,): mx.zeros((2, 3))})[1].size == 0


def test_another_size_of_the_side_is_refused() -> None:
    model = model_of("hunyuan")
    decoder = model.decoder()
    decoder._measurement = replace(model.measurement, shared=5)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"blocks share 32 numbers beside the residual stream, and when .* 5: use"):
        decoder.trace(3)


def test_tokens_that_are_hidden_beyond_the_vocabulary_are_refused() -> None:
    """Else mlx-lm writes beyond the end of the logits."""
    config = CONFIGS["granite"] | {"vocab_size": 32}
    module = module_of("granite", seed=1)
    module._hidden = mx.array([3, 40])
    with pytest.raises(InputError, match=r"'granite' hide tokens up to number 40, .* vocabulary of 32: use one"):
        MeasuredModel(module, config, "granite")
