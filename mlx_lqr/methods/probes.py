"""Linear probes: how well a logistic regression tells two sets of activations apart that it was not fitted on.

Many probes are fitted at once, each on features of its own: one for every attention head of a block, for example.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mlx_lqr.backends.protocol import Float32
from mlx_lqr.errors import InputError

Float64 = NDArray[np.float64]

RIDGE = 1.0
"""Half of it times |w|^2 is added to the sum of the log-losses, so that sets that can be separated have a probe too."""
FOLDS = 5
"""A probe is fitted on four fifths of the prompts, as in Li et al. 2023, and here tried on every fifth in turn."""


def held_out(positive: Float32, negative: Float32) -> tuple[Float64, Float64]:
    """Cross-validated accuracy of h probes, and their mean log-likelihood (natural logarithm), (h,) each.

    Prompt i of either set is held out with fold i modulo the number of folds: no random numbers, and prompts that
    stand beside each other in the two sets are held out together.

    Args:
        positive, negative: (n, h, p) and (m, h, p): p features for each probe.

    Raises:
        InputError: a set of a single prompt, of which none can be held out.
    """
    folds = min(FOLDS, len(positive), len(negative))
    if folds < 2:
        raise InputError("a probe needs at least two positive and two negative prompts: give more")
    activations = np.concatenate([positive, negative]).transpose(1, 0, 2).astype(np.float64)  # (h, n + m, p)
    labels = np.repeat([1.0, -1.0], [len(positive), len(negative)])
    fold = np.concatenate([np.arange(len(positive)), np.arange(len(negative))]) % folds
    correct, likelihood = np.zeros(len(activations)), np.zeros(len(activations))
    for held in range(folds):
        train, test = activations[:, fold != held], activations[:, fold == held]
        centre, scale = train.mean(axis=1, keepdims=True), train.std(axis=1, keepdims=True)
        scale[scale == 0] = 1
        weight, bias = logistic_regression((train - centre) / scale, labels[fold != held])
        margin = labels[fold == held] * (((test - centre) / scale) @ weight[:, :, None] + bias[:, None, None])[..., 0]
        correct += (margin > 0).sum(axis=1)
        likelihood -= np.logaddexp(0, -margin).sum(axis=1)
    return correct / len(labels), likelihood / len(labels)


def logistic_regression(features: Float64, labels: Float64, ridge: float = RIDGE) -> tuple[Float64, Float64]:
    """Weights w (h, p) and biases b (h,) that minimise sum_i log(1 + exp(-y_i (w . x_i + b))) + ridge / 2 |w|^2.

    Newton's method for h problems at once, a step halved where it would raise the loss.

    Args:
        features: x, (h, n, p).
        labels: y, (n,), 1 or -1.
    """
    h, n, p = features.shape
    x = np.concatenate([features, np.ones((h, n, 1))], axis=2)
    penalty = np.append(np.full(p, ridge), 1e-9)  # the bias goes free, but its Hessian must not vanish

    def loss(solution: Float64) -> Float64:
        margin = labels * (x @ solution[:, :, None])[..., 0]
        return np.asarray(np.logaddexp(0, -margin).sum(axis=1) + 0.5 * (penalty * solution**2).sum(axis=1))

    solution = np.zeros((h, p + 1))
    current = loss(solution)
    for _ in range(50):
        margin = labels * (x @ solution[:, :, None])[..., 0]
        wrong = np.exp(-np.logaddexp(0, margin))  # the probability of the other label
        gradient = penalty * solution - ((labels * wrong)[:, None] @ x)[:, 0]
        hessian = (x * (wrong * (1 - wrong))[..., None]).transpose(0, 2, 1) @ x
        hessian[:, range(p + 1), range(p + 1)] += penalty
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = np.ones((h, 1))
        while (size > 1e-4).any():
            after = loss(solution - size * step)
            rises = after > current
            if not rises.any():
                break
            size = np.where(rises[:, None], size / 2, size)
        size[after > current] = 0
        solution = solution - size * step
        current = loss(solution)
        if np.abs(size * step).max() < 1e-6:
            break
    return solution[:, :p], solution[:, p]
