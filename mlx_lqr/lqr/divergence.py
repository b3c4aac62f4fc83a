"""How far next-token distributions are from one another; NumPy only.

KL(p || q) = sum_x p(x) (log p(x) - log q(x)), in nats, of two distributions given by their logits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def log_softmax(logits: ArrayLike) -> NDArray[np.float64]:
    """log p over the last axis, in float64."""
    values = np.asarray(logits, np.float64)
    shifted = values - values.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def log_normaliser(logits: ArrayLike) -> NDArray[np.float64]:
    """log sum_x exp(logit(x)) over the last axis, in float64: (..., V) -> (...)."""
    return _normalised(np.asarray(logits, np.float64))[1]


def kl_divergence(
    logits: ArrayLike, reference: ArrayLike, normaliser: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """KL(softmax(logits) || softmax(reference)) over the last axis, in nats: (..., V) -> (...). 0 for the same logits.

    Args:
        logits, reference: of the two distributions.
        normaliser: `log_normaliser(reference)`, for a reference that is used again.
    """
    values = np.asarray(logits, np.float64)
    p, own = _normalised(values)
    with np.errstate(invalid="ignore"):
        further = values - np.asarray(reference)
        mean = np.einsum("...v,...v->...", p, further)
        if np.isnan(mean).any():  # 0 times infinity, where a distribution is certain
            mean = np.where(p > 0, p * further, 0.0).sum(axis=-1)
    return np.asarray(mean - (own - (log_normaliser(reference) if normaliser is None else normaliser)))


def _normalised(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The distribution of logits (..., V), and their log-normaliser (...)."""
    largest = values.max(axis=-1, keepdims=True)
    p = np.exp(values - largest)
    total = p.sum(axis=-1, keepdims=True)
    p /= total
    return p, (largest + np.log(total))[..., 0]
