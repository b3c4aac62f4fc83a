"""PCA contrast vectors: the numbers of scikit-learn's PCA, with repeng's sign."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.backends import BACKENDS, tiny_on

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.methods import law_of
from mlx_lqr.methods.pca import component

POSITIVE, NEGATIVE = [[1, 2, 3], [4, 5], [9, 30, 7], [2, 2], [60, 1]], [[6, 7], [8], [12, 44], [3, 9, 9], [50, 21]]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def by_scikit_learn(positive: np.ndarray, negative: np.ndarray, rows: str) -> np.ndarray:
    """The first principal component (d,) of n pairs (n, d), turned to where more positives project further."""
    decomposition: Any = pytest.importorskip("sklearn.decomposition")
    middle = (positive + negative) / 2
    both = np.stack([positive - middle, negative - middle], axis=1).reshape(-1, positive.shape[1])
    pca = decomposition.PCA(n_components=1, svd_solver="full")
    axis = pca.fit(positive - negative if rows == "pca_diff" else both).components_[0]
    smaller, larger = (np.mean(compare(positive @ axis, negative @ axis)) for compare in (np.less, np.greater))
    return np.asarray(-axis if smaller > larger else axis)


@pytest.mark.parametrize("rows", ["pca_diff", "pca_center"])
@pytest.mark.parametrize("pairs", [2, 3, 7, 40])
def test_the_axis_and_its_sign_are_those_of_scikit_learn(rows: str, pairs: int, random: np.random.Generator) -> None:
    for _ in range(10):
        positive, negative = random.standard_normal((2, pairs, 12)) + random.standard_normal((2, 1, 12))
        axis = component(positive.astype(np.float32), negative.astype(np.float32), rows)
        expected = by_scikit_learn(positive.astype(np.float32), negative.astype(np.float32), rows)
        assert np.allclose(axis, expected, atol=1e-4)
        assert np.linalg.norm(axis) == pytest.approx(1)


@every_backend
@pytest.mark.parametrize("rows", ["pca_diff", "pca_center"])
def test_it_is_fitted_on_outputs_at_the_last_token_and_added_there(backend: str, rows: str) -> None:
    model = tiny_on(backend, "llama")
    steering: Any = mlx_lqr.fit_baseline(model, "pca", POSITIVE, NEGATIVE, layers=[0, 2], rows=rows)
    outputs = [np.stack([model.residuals([prompt])[0] for prompt in prompts]) for prompts in (POSITIVE, NEGATIVE)]
    for k in (0, 2):
        expected = by_scikit_learn(outputs[0][:, k + 1], outputs[1][:, k + 1], rows)
        assert np.allclose(steering.tensors["shift"][k, :, 0], expected, atol=1e-3)
    assert not steering.tensors["shift"][1].any()
    assert steering.positions == "all"
    plain, steered = (
        model.residuals([[5, 17, 3]], law=law_of(steering, strength), steer_all=True)[0] for strength in (0.0, 2.5)
    )
    assert np.allclose(steered[1] - plain[1], 2.5 * steering.tensors["shift"][0, :, 0], atol=1e-5)


def test_the_differences_mean_is_no_part_of_pca_diff_and_all_of_pca_center() -> None:
    """All pairs differ by the same: nothing varies among the differences, while both of a pair lie on one line."""
    difference = np.array([3.0, 0.0, 4.0], np.float32)
    negative = np.arange(15, dtype=np.float32).reshape(5, 3)
    assert not component(negative + difference, negative, "pca_diff").any()
    assert np.allclose(component(negative + difference, negative, "pca_center"), difference / 5, atol=1e-6)
    assert np.allclose(component(negative, negative + difference, "pca_center"), -difference / 5, atol=1e-6)


def test_prompts_that_are_no_pairs_are_refused() -> None:
    model = tiny_on("mlx", "llama")
    with pytest.raises(InputError, match="pca compares pairs of prompts, not 5 positive with 4 negative ones: give as"):
        mlx_lqr.fit_baseline(model, "pca", POSITIVE, NEGATIVE[:4])
    with pytest.raises(InputError, match="at least two pairs"):
        mlx_lqr.fit_baseline(model, "pca", POSITIVE[:1], NEGATIVE[:1])
    with pytest.raises(InputError, match="rows must be 'pca_diff' or 'pca_center', not 'umap'"):
        mlx_lqr.fit_baseline(model, "pca", POSITIVE, NEGATIVE, rows="umap")
