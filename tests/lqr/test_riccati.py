"""The solver against brute force, scipy and what optimality means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.linear_systems import system
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import solve_discrete_are

from mlx_lqr import InputError, solve
from mlx_lqr.backends.protocol import LinearAlgebra
from mlx_lqr.backends.torch.algebra import TorchAlgebra
from mlx_lqr.lqr.algebra import NumPyAlgebra
from mlx_lqr.lqr.riccati import Weights, cost_to_go, sweep


def cost(jacobians: list[np.ndarray], gains: list[np.ndarray], weights: Weights, z: np.ndarray) -> float:
    total = 0.0
    for A, K in zip(jacobians, gains, strict=True):
        u = -K @ z
        total += weights.q * z @ z + weights.r * u @ u
        z = A @ z + u
    return float(total + weights.qf * z @ z)


def brute_force_gain(jacobians: list[np.ndarray], weights: Weights, allowed: set[int]) -> np.ndarray:
    """K_0 from one stacked least-squares problem in all the controls, for every initial state at once."""
    T, d = len(jacobians), jacobians[0].shape[0]
    free = np.eye(d)
    forced = np.zeros((d, T * d))
    rows, right = [], []
    for k, A in enumerate(jacobians):
        if k > 0:
            rows.append(np.sqrt(weights.q) * forced)
            right.append(-np.sqrt(weights.q) * free)
        forced = A @ forced
        if k in allowed:
            forced[:, k * d : (k + 1) * d] += np.eye(d)
        free = A @ free
    rows += [np.sqrt(weights.qf) * forced, np.sqrt(weights.r) * np.eye(T * d)]
    right += [-np.sqrt(weights.qf) * free, np.zeros((T * d, d))]
    controls = np.linalg.lstsq(np.vstack(rows), np.vstack(right), rcond=None)[0]
    return -controls[:d]


@pytest.mark.parametrize("weights", [Weights(0.1, 1, 0.1), Weights(10, 1, 10), Weights(0, 1, 5), Weights(3, 0.01, 0)])
@pytest.mark.parametrize("allowed", [{0, 1, 2, 3, 4}, {0, 3}])
def test_gains_equal_the_stacked_least_squares_solution(weights: Weights, allowed: set[int]) -> None:
    jacobians = system(5, 6)
    gains = solve(jacobians, weights.q, weights.r, weights.qf, layers=allowed)
    expected = brute_force_gain(jacobians, weights, allowed)
    assert np.linalg.norm(gains[0] - expected) < 1e-6 * np.linalg.norm(expected)
    for k in set(range(5)) - allowed:
        assert not gains[k].any()


def test_a_long_constant_system_reaches_the_stationary_solution() -> None:
    A = system(1, 8, seed=3)[0]
    S = solve_discrete_are(A, np.eye(8), 0.3 * np.eye(8), 2.0 * np.eye(8))
    expected = np.linalg.solve(S + 2.0 * np.eye(8), S @ A)
    gains = solve([A] * 200, 0.3, 2.0, 1.0)
    assert np.linalg.norm(gains[0] - expected) < 1e-6 * np.linalg.norm(expected)


def test_single_precision_stays_close_to_double() -> None:
    jacobians = system(20, 24)
    double, single = solve(jacobians, 1, 1, 1), solve(jacobians, 1, 1, 1, dtype=np.float32)
    assert single[0].dtype == np.float32
    assert max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(single, double, strict=True)) < 1e-4


positive = st.floats(1e-3, 1e3)


@settings(deadline=None, max_examples=25)
@given(q=positive, r=positive, qf=positive, scale=positive, seed=st.integers(0, 99))
def test_only_ratios_of_the_weights_matter(q: float, r: float, qf: float, scale: float, seed: int) -> None:
    jacobians = system(4, 5, seed)
    one, other = solve(jacobians, q, r, qf), solve(jacobians, scale * q, scale * r, scale * qf)
    for a, b in zip(one, other, strict=True):
        assert np.allclose(a, b, rtol=1e-7, atol=1e-10)


@settings(deadline=None, max_examples=25)
@given(q=positive, r=positive, qf=positive, seed=st.integers(0, 99), size=st.floats(1e-3, 0.3))
def test_no_perturbed_gain_costs_less(q: float, r: float, qf: float, seed: int, size: float) -> None:
    weights, jacobians = Weights(q, r, qf), system(4, 5, seed)
    gains = list(solve(jacobians, q, r, qf))
    random = np.random.default_rng(seed)
    z = random.standard_normal(5)
    best = cost(jacobians, gains, weights, z)
    perturbed = [K + size * random.standard_normal(K.shape) for K in gains]
    assert best <= cost(jacobians, perturbed, weights, z) * (1 + 1e-9)


@settings(deadline=None, max_examples=25)
@given(q=positive, more=st.floats(1.1, 10), seed=st.integers(0, 99))
def test_more_weight_on_the_state_never_tracks_worse(q: float, more: float, seed: int) -> None:
    jacobians = system(4, 5, seed)
    z = np.random.default_rng(seed).standard_normal(5)
    tracking = Weights(1.0, 1e-300, 1.0)
    costs = [cost(jacobians, list(solve(jacobians, x, 1, x)), tracking, z) for x in (q, more * q)]
    assert costs[1] <= costs[0] * (1 + 1e-9)


@pytest.mark.parametrize(
    ("q", "r", "qf", "says"),
    [(-1, 1, 1, "negative"), (1, 0, 1, "r must be above"), (1, -2, 1, "r must"), (float("nan"), 1, 1, "finite"),
     (0, 1, 0, "both zero"), (1, 1, -1, "negative"), ("x", 1, 1, "number")],
)  # fmt: skip
def test_weights_out_of_range_are_refused(q: float, r: float, qf: float, says: str) -> None:
    with pytest.raises(InputError, match=says):
        solve(system(2, 3), q, r, qf)


@pytest.mark.parametrize("layers", [[], [5], [-6]])
def test_layers_out_of_range_are_refused(layers: list[int]) -> None:
    with pytest.raises(InputError, match="layers"):
        solve(system(5, 3), layers=layers)


def test_a_failing_layer_is_named() -> None:
    jacobians = system(5, 4)
    jacobians[3] = np.full((4, 4), np.inf)
    with pytest.raises(InputError, match="layer 3"):
        solve(jacobians)
    with pytest.raises(InputError, match="overflows float32 at layer 2"):
        solve([np.eye(4), np.eye(4), 1e30 * np.eye(4)], dtype=np.float32)


def test_a_badly_conditioned_layer_is_named_and_float64_is_the_way_out() -> None:
    jacobians = [np.eye(4), np.diag([1.0, 1.0, 1.0, 3e4]), np.eye(4)]
    with pytest.raises(InputError, match=r"layer 0: .*conditioned in float32; .*solve in float64"):
        solve(jacobians, dtype=np.float32)
    assert all(np.isfinite(K).all() for K in solve(jacobians))


@settings(deadline=None, max_examples=25)
@given(q=positive, r=positive, qf=positive, seed=st.integers(0, 99))
def test_the_cost_to_go_stays_symmetric_positive_and_is_what_the_gains_cost(
    q: float, r: float, qf: float, seed: int
) -> None:
    weights, jacobians = Weights(q, r, qf), system(4, 5, seed)
    steps = list(cost_to_go(((k, jacobians[k]) for k in (3, 2, 1, 0)), weights, range(4)))
    for _, _, S in steps:
        assert np.array_equal(S, S.T)
        assert np.linalg.eigvalsh(S).min() >= 0
    z = np.random.default_rng(seed).standard_normal(5)
    spent = cost(jacobians, [K for _, K, _ in reversed(steps)], weights, z)
    assert np.isclose(z @ steps[-1][2] @ z, spent, rtol=1e-8)


def test_the_sweep_asks_for_one_jacobian_at_a_time() -> None:
    asked: list[int] = []

    def stream():  # type: ignore[no-untyped-def]
        for k in (2, 1, 0):
            asked.append(k)
            yield k, np.eye(3)

    for k, _ in sweep(stream(), Weights(), range(3)):
        assert asked[-1] == k


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (1, 3)])
@pytest.mark.parametrize("algebra", [NumPyAlgebra(), TorchAlgebra(torch.device("cpu"))], ids=["numpy", "torch"])
def test_control_along_one_direction_is_the_cheapest_of_its_kind(
    layers: tuple[int, ...], algebra: LinearAlgebra, random: np.random.Generator
) -> None:
    """u_k = b_k c_k, and the numbers c_k minimise a quadratic function of them all, which least squares solve."""
    T, d, weights = 4, 6, Weights(0.7, 0.3, 2.0)
    A = random.standard_normal((T, d, d)) / 2
    b, start = random.standard_normal((T, d)), random.standard_normal(d)
    steps = sweep(((k, A[k]) for k in reversed(range(T))), weights, layers, algebra=algebra, pushes=b)
    gains = dict(steps)
    states, numbers = [start], []
    for k in range(T):
        u = -gains[k] @ states[-1]
        assert np.linalg.matrix_rank(np.stack([u, b[k]]), tol=1e-9) == 1
        numbers.append(float(u @ b[k] / (b[k] @ b[k])))
        states.append(A[k] @ states[-1] + u)
    # z_k is linear in the numbers of the controlled layers: z_k = free_k + S_k c.
    free, S, rows, wanted = start, np.zeros((d, len(layers))), [], []
    for k in range(T + 1):
        price = np.sqrt(weights.qf if k == T else weights.q)
        rows.append(price * S)
        wanted.append(-price * free)
        if k < T:
            free, S = A[k] @ free, A[k] @ S
            if k in layers:
                S[:, layers.index(k)] += b[k]
    rows.append(np.sqrt(weights.r) * np.eye(len(layers)))
    wanted.append(np.zeros(len(layers)))
    best = np.linalg.lstsq(np.vstack(rows), np.concatenate(wanted), rcond=None)[0]
    assert np.allclose([numbers[k] for k in layers], best, rtol=1e-8)
    assert all(numbers[k] == 0 for k in range(T) if k not in layers)
