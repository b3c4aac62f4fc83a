"""Weights, induced norms and bounds of the error system, on systems with known answers and on random ones."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from helpers.transitions import transition_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh

from mlx_lqr import InputError
from mlx_lqr.analysis.lyapunov import (
    LyapunovStep,
    dual_norm,
    error_bound,
    largest_eigenvalue,
    lyapunov_sweep,
    prior_bound,
    remainder_bound,
    spectral_norm,
    transition_products,
    weighted_norm,
)


def swept(closed_loop: list[np.ndarray]) -> list[LyapunovStep]:
    """The steps in the order of the layers."""
    return list(lyapunov_sweep((k, closed_loop[k]) for k in reversed(range(len(closed_loop)))))[::-1]


def factors(steps: list[LyapunovStep]) -> list[np.ndarray]:
    """Of P_0..P_T."""
    return [step.factor for step in steps] + [steps[-1].next_factor]


def systems(random: np.random.Generator, T: int, d: int, norm: float) -> list[np.ndarray]:
    """Random closed loops with |F_k|_2 = norm."""
    matrices = random.standard_normal((T, d, d))
    return [norm * F / np.linalg.norm(F, 2) for F in matrices]


def test_a_scalar_loop_has_the_weights_of_the_geometric_series() -> None:
    f, T = 0.5, 6
    steps = swept([np.array([[f]])] * T)
    for k, step in enumerate(steps):
        P = (1 - f ** (2 * (T - k + 1))) / (1 - f**2)  # 1 + f^2 + ... + f^(2 (T - k))
        above = (1 - f ** (2 * (T - k))) / (1 - f**2)
        assert step.largest_weight == pytest.approx(P)
        assert step.step_norm == pytest.approx(f * np.sqrt(above / P))
        assert step.to_output == pytest.approx(f ** (T - k) / np.sqrt(P))
    table = transition_norms([np.array([[f]])] * T)
    assert table == pytest.approx(transition_products([step.step_norm for step in steps]))  # scalars just multiply


@given(
    st.integers(1, 6),
    st.floats(-1.5, 1.5),
    st.floats(0, 2),
    st.floats(0, 1),
)
@settings(max_examples=50, deadline=None)
def test_the_bound_of_a_scalar_system_with_positive_terms_is_its_trajectory(
    T: int, f: float, L: float, x: float
) -> None:
    """All terms positive, every inequality in the bound is an equality."""
    f = abs(f)
    steps = swept([np.array([[f]])] * T)
    roots = [factor[0, 0] for factor in factors(steps)]  # |x|_P = root |x|
    error = [x]
    for k in range(T):
        remainder = L / 2 * (roots[k] * error[k]) ** 2 / roots[k + 1]  # |r|_{P_{k+1}} = (L / 2) |x|^2_{P_k}
        error.append(f * error[k] + remainder)
    measured = np.array(roots) * np.array(error)
    disturbance = remainder_bound(np.zeros(T), np.full(T, L), measured[:-1])
    bound = error_bound(transition_products([step.step_norm for step in steps]), measured[0], disturbance)
    assert bound == pytest.approx(measured, rel=1e-9)


def test_the_weights_add_up_what_an_error_becomes(random: np.random.Generator) -> None:
    F = systems(random, 5, 7, 1.3)
    P = factors(swept(F))
    for k in range(6):
        x = random.standard_normal(7)
        total, moved = x @ x, x
        for j in range(k, 5):
            moved = F[j] @ moved
            total += moved @ moved
        assert weighted_norm(P[k], x) ** 2 == pytest.approx(total)


@pytest.mark.parametrize("d", [5, 80])  # computed densely, and by Lanczos iterations
def test_induced_norms_are_those_of_the_generalised_eigenvalue_problem(d: int, random: np.random.Generator) -> None:
    F = systems(random, 4, d, 1.2)
    steps = swept(F)
    P = [factor @ factor.T for factor in factors(steps)]
    exact = transition_norms(F)
    for k, step in enumerate(steps):
        (top,) = eigh(F[k].T @ P[k + 1] @ F[k], P[k], eigvals_only=True, subset_by_index=[d - 1, d - 1])
        assert step.step_norm == pytest.approx(np.sqrt(top), rel=1e-7)
        assert exact[k + 1, k] == pytest.approx(np.sqrt(top), rel=1e-7)
        assert step.to_output == pytest.approx(exact[4, k], rel=1e-7)
    product = transition_products([step.step_norm for step in steps])
    assert np.all(exact <= product + 1e-9)
    assert np.all(np.triu(exact, 1) == 0)
    assert spectral_norm(F[0]) == pytest.approx(1.2)
    assert largest_eigenvalue(P[0]) == pytest.approx(np.linalg.eigvalsh(P[0])[-1])


def test_no_vector_beats_an_induced_norm(random: np.random.Generator) -> None:
    F = systems(random, 4, 6, 0.9)
    P, table = factors(swept(F)), transition_norms(F)
    for i in range(5):
        x = random.standard_normal((500, 6))
        moved = x
        for k in range(i, 4):
            moved = moved @ F[k].T
            ratio = weighted_norm(P[k + 1], moved) / weighted_norm(P[i], x)
            assert ratio.max() <= table[k + 1, i] + 1e-12


@given(
    st.integers(0, 10**6),
    st.integers(2, 6),
    st.integers(1, 5),
    st.floats(0.2, 0.99),
    st.floats(0, 1),
    st.floats(0, 0.3),
)
@settings(max_examples=60, deadline=None)
def test_the_bound_holds_for_every_trajectory_of_random_contracting_systems(
    seed: int, T: int, d: int, norm: float, L: float, mismatch: float
) -> None:
    """With remainders as large as allowed, in random directions; exact transitions, products, features, a priori."""
    random = np.random.default_rng(seed)
    F = systems(random, T, d, norm)
    steps = swept(F)
    P = factors(steps)
    c, curvature = np.full(T, mismatch), np.full(T, L)
    known = random.standard_normal((T, d))
    n = 20
    error, predicted = np.zeros((n, T + 1, d)), np.zeros((T + 1, d))
    for k in range(T):
        size = weighted_norm(P[k], error[:, k])
        r = random.standard_normal((n, d))
        r *= (remainder_bound(mismatch, L, size) / weighted_norm(P[k + 1], r))[:, None]
        error[:, k + 1] = error[:, k] @ F[k].T + known[k] + r
        predicted[k + 1] = F[k] @ predicted[k] + known[k]
    size = np.stack([weighted_norm(P[k], error[:, k]) for k in range(T + 1)], axis=1)
    off = np.stack([weighted_norm(P[k], error[:, k] - predicted[k]) for k in range(T + 1)], axis=1)
    forced = np.array([weighted_norm(P[k], predicted[k]) for k in range(T + 1)])
    v = random.standard_normal((T + 1, d))
    features = np.zeros((T + 1, T + 1))
    for k in range(T + 1):
        column = v[k]
        for i in reversed(range(k + 1)):
            features[k, i] = dual_norm(P[i], column[:, None])[0]
            column = F[i - 1].T @ column if i else column
    allowed = remainder_bound(c, curvature, size[:, :-1])
    exact, product = transition_norms(F), transition_products([step.step_norm for step in steps])
    feature_off = np.abs(np.einsum("nkd,kd->nk", error - predicted, v))
    for table in (exact, product):
        bound = error_bound(table, 0.0, allowed)
        assert np.all(off <= bound * (1 + 1e-9) + 1e-9)
        prior, disturbance = prior_bound(table, forced, c, curvature)
        assert np.all(off <= prior * (1 + 1e-9) + 1e-9)
        assert np.all(bound <= prior * (1 + 1e-9) + 1e-9)
        assert np.all(feature_off <= error_bound(features, 0.0, disturbance) * (1 + 1e-9) + 1e-9)
    assert np.all(feature_off <= error_bound(features, 0.0, allowed) * (1 + 1e-9) + 1e-9)
    along = dual_norm_of_rows(P, v) * error_bound(exact, 0.0, allowed)
    assert np.all(error_bound(features, 0.0, allowed) <= along * (1 + 1e-9) + 1e-9)  # the tighter of the two


def dual_norm_of_rows(P: list[np.ndarray], v: np.ndarray) -> np.ndarray:
    return np.array([dual_norm(factor, row[:, None])[0] for factor, row in zip(P, v, strict=True)])


@given(st.integers(0, 10**6), st.floats(0, 0.5))
@settings(max_examples=25, deadline=None)
def test_the_bound_holds_from_any_initial_error(seed: int, L: float) -> None:
    random = np.random.default_rng(seed)
    F = systems(random, 5, 4, 0.8)
    steps = swept(F)
    P = factors(steps)
    error = [random.standard_normal((30, 4))]
    for k in range(5):
        r = random.standard_normal((30, 4))
        r *= (L / 2 * weighted_norm(P[k], error[k]) ** 2 / weighted_norm(P[k + 1], r))[:, None]
        error.append(error[k] @ F[k].T + r)
    size = np.stack([weighted_norm(P[k], error[k]) for k in range(6)], axis=1)
    disturbance = remainder_bound(np.zeros(5), np.full(5, L), size[:, :-1])
    bound = error_bound(transition_norms(F), size[:, 0], disturbance)
    assert np.all(size <= bound * (1 + 1e-9))
    assert np.all(size[:, 0] == bound[:, 0])


def test_a_bound_that_runs_away_is_infinite_and_never_nan() -> None:
    T = 40
    prior, disturbance = prior_bound(
        transition_products(np.ones(T)), np.full((1, T + 1), 10.0), np.ones(T), np.full(T, 10.0)
    )
    assert np.isinf(prior[0, -1])
    assert not np.isnan(prior).any()
    assert not np.isnan(error_bound(np.tril(np.ones((T + 1, T + 1))), 0.0, disturbance)).any()


def test_weights_that_overflow_name_the_layer() -> None:
    with pytest.raises(InputError, match="layer 1"):
        list(lyapunov_sweep((k, np.eye(2) * 1e100) for k in reversed(range(3))))


def test_memory_does_not_grow_with_the_number_of_layers() -> None:
    d = 100

    def peak(T: int) -> float:
        """In (d, d) float64 matrices."""
        random = np.random.default_rng(0)
        tracemalloc.start()
        for _ in lyapunov_sweep((k, random.standard_normal((d, d)) / 30) for k in reversed(range(T))):
            pass
        return tracemalloc.get_traced_memory()[1] / (8 * d * d)

    few, many = peak(3), peak(9)
    tracemalloc.stop()
    assert many < 1.1 * few
    assert many < 14
