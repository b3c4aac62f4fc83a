"""Divergence of next-token distributions, against the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlx_lqr.lqr.divergence import kl_divergence, log_normaliser


def test_kl_divergence() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    by_hand = 0.5 * math.log(2) - 0.25 * math.log(2)
    shifted = np.stack([np.log(p) + 7, np.log(q) - 300])
    assert kl_divergence(shifted[0], shifted[1]) == pytest.approx(by_hand, abs=1e-12)
    assert kl_divergence(shifted, shifted) == pytest.approx([0, 0], abs=1e-12)
    logits, reference = np.random.default_rng(0).standard_normal((2, 3, 50)).astype(np.float32) * 9
    p, q = (np.exp(one.astype(np.float64)) for one in (logits, reference))
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    expected = (p * np.log(p / q)).sum(axis=1)
    assert kl_divergence(logits, reference) == pytest.approx(expected, rel=1e-12)
    assert kl_divergence(logits, reference, log_normaliser(reference)) == pytest.approx(expected, rel=1e-12)
    assert (kl_divergence(logits, logits, log_normaliser(logits)) == 0).all()  # and not nearly
    certain = kl_divergence([0.0, -np.inf], [0.0, 0.0])
    assert certain == pytest.approx(math.log(2))
