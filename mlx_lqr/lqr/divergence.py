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


def kl_divergence(logits: ArrayLike, reference: ArrayLike) -> NDArray[np.float64]:
    """KL(softmax(logits) || softmax(reference)) over the last axis, in nats: (..., V) -> (...)."""
    log_p, log_q = log_softmax(logits), log_softmax(reference)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):  # 0 times infinity, where both distributions are certain
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    return np.asarray(terms.sum(axis=-1))
