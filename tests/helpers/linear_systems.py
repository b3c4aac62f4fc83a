"""Random linear systems for the solvers."""

from __future__ import annotations

import numpy as np


def system(T: int, d: int, seed: int = 0) -> list[np.ndarray]:
    """T Jacobians (d, d) like a transformer's: the identity and something of its size."""
    random = np.random.default_rng(seed)
    return [np.eye(d) + random.standard_normal((d, d)) / np.sqrt(d) for _ in range(T)]
