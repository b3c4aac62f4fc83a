"""Prompts -> mean last-token activations -> the direction of a concept at every layer.

e_k = mean+_k - mean-_k over the last-token residual streams z_k of positive and negative prompts; mu_k = norm(e_k) and
v_k = e_k / mu_k (difference of means, arXiv 2604.19018). Where mu_k = 0 the direction is zero and nothing is
controlled: always so at layer 0 when all prompts end in the same token.

How well a layer separates the sets is mu_k over the pooled standard deviation of v_k . z_k within them (Cohen's d,
1988). Where that is small, the feature of ordinary text already varies by many mu_k, and a setpoint there asks for
large pushes that mean nothing. layers="auto" leaves these layers out.

A few prompts in many dimensions are told apart by chance. Cross-validation shows it: each prompt is projected on the
direction of folds that it is not in, and Cohen's d of these projections is about 0 where the sets do not differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_lqr.backends.protocol import Float32, Progress, Recorder, Runner
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.prompts import Prompt, tokenise_sets


@dataclass(frozen=True, eq=False)
class Contrast:
    """How the activations of two sets of prompts differ, for a model of T blocks of width d (all float32).

    `direction` holds e_k, unnormalised: its norm over a row is mu_k.
    """

    mean_positive: Float32
    """(T, d): mean z_k over the positive prompts, at the input of each block."""
    mean_negative: Float32
    """(T, d)"""
    direction: Float32
    """(T, d): e_k = mean_positive - mean_negative"""
    output_direction: Float32
    """(d,): the same difference for z_T, the last block's output"""
    prompt_counts: tuple[int, int]
    """How many positive and negative prompts."""
    fingerprint: str = ""
    model_name: str = ""
    std: Float32 | None = None
    """(T + 1,): pooled standard deviation of v_k . z_k within the sets, at z_0..z_T; None for two single prompts"""
    held_out: Float32 | None = None
    """(T + 1,): Cohen's d of prompts that the direction was not computed from, at z_0..z_T (cross-validated)

    About 0 where the sets differ by chance alone, negative where prompts fall on the wrong side; zero where mu_k is
    zero; None where a set has fewer than two prompts."""
    discriminant: Float32 | None = None
    """(T, d): Fisher's linear discriminant w_k of the two sets, scaled to w_k . v_k = 1; zero where mu_k is zero; None
    for two single prompts. See `_discriminant`."""

    @property
    def magnitude(self) -> Float32:
        """mu_k = norm(e_k): (T,)"""
        return np.linalg.norm(self.direction, axis=-1)

    @property
    def output_magnitude(self) -> float:
        """mu_T = norm(e_T)"""
        return float(np.linalg.norm(self.output_direction))

    @property
    def unit_direction(self) -> Float32:
        """v_k = e_k / mu_k, zero where mu_k is zero: (T, d)"""
        return unit(self.direction)

    @property
    def separation(self) -> Float32:
        """mu_k over `std`, at z_0..z_T; zero where mu_k is zero: (T + 1,)

        Raises:
            InputError: a single prompt of each kind, which has no standard deviation.
        """
        if self.std is None:
            raise InputError('layers "auto" compares the prompts of a set with one another: give more than one of each')
        magnitude = np.append(self.magnitude, np.float32(self.output_magnitude))
        with np.errstate(divide="ignore"):
            return np.divide(magnitude, self.std, out=np.zeros_like(magnitude), where=magnitude > 0)


def contrast(
    model: Recorder,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    progress: Progress | None = None,
) -> Contrast:
    """Run both sets of prompts through the model and take the difference of their mean last-token activations.

    Args:
        model: what `load` returned.
        positive, negative: prompts with and without the concept; strings or token ids.
        progress: called as progress(stage, done, total).

    Raises:
        InputError: a set is empty, both sets are the same, a prompt has no tokens or does not fit the model's context,
            the activations overflow, or they are the same for both sets.
    """
    return contrast_of(model, *activations(model, *tokenise_sets(model, positive, negative), progress))


def activations(
    model: Recorder,
    positive: Sequence[Sequence[int]],
    negative: Sequence[Sequence[int]],
    progress: Progress | None = None,
) -> tuple[Float32, Float32]:
    """z_0..z_T at the last token of each prompt of two sets, as token ids: (n, T + 1, d) and (m, T + 1, d)

    Raises:
        OverflowingError: activations overflow (the layer is named).
    """
    residuals = model.residuals([*positive, *negative], progress=progress)
    return residuals[: len(positive)], residuals[len(positive) :]


def contrast_of(model: Runner, positive: Float32, negative: Float32) -> Contrast:
    """The contrast of two sets of prompts from their `activations`.

    Raises:
        InputError: the activations of both sets are the same.
    """
    mean_positive, mean_negative = positive.mean(axis=0, dtype=np.float64), negative.mean(axis=0, dtype=np.float64)
    difference = np.where(_same_multiset(positive, negative), 0.0, mean_positive - mean_negative)
    if not difference[:-1].any():
        raise InputError("the activations of the positive and the negative prompts do not differ")
    return Contrast(
        mean_positive[:-1].astype(np.float32),
        mean_negative[:-1].astype(np.float32),
        difference[:-1].astype(np.float32),
        difference[-1].astype(np.float32),
        (len(positive), len(negative)),
        model.fingerprint,
        model.name,
        _pooled_std(positive, negative, difference),
        _held_out_separation(positive, negative, difference),
        _discriminant(positive, negative, difference),
    )


def unit(vectors: np.ndarray) -> np.ndarray:
    """Each row of vectors (..., d) scaled to length 1; zero rows stay zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)


def _pooled_std(positive: Float32, negative: Float32, difference: np.ndarray) -> Float32 | None:
    """The pooled standard deviation of v_k . z_k within two sets of activations (n, T + 1, d): (T + 1,)"""
    freedom = len(positive) + len(negative) - 2
    if freedom == 0:
        return None
    directions = unit(difference)
    squares = sum(
        ((feature - feature.mean(axis=0)) ** 2).sum(axis=0)
        for feature in (np.einsum("nkd,kd->nk", residuals, directions) for residuals in (positive, negative))
    )
    return np.sqrt(squares / freedom).astype(np.float32)


FOLDS = 5
"""Of the cross-validation. Where a set has fewer than ten prompts, one prompt of each set is left out at a time."""


def _held_out_separation(positive: Float32, negative: Float32, difference: np.ndarray) -> Float32 | None:
    """`Contrast.held_out` of two sets of activations (n, T + 1, d) and (m, T + 1, d).

    Prompt i of each set is in fold i modulo the number of folds, so that sets that are paired line by line are left out
    in pairs. A fold is projected on v, the unit difference of the other folds' means, from the middle of these means:
    v differs from fold to fold, and so does where it counts from.
    """
    smaller = min(len(positive), len(negative))
    if smaller < 2:
        return None
    folds = FOLDS if smaller >= 2 * FOLDS else smaller
    sets, total = (positive, negative), [one.sum(axis=0, dtype=np.float64) for one in (positive, negative)]
    features = [np.empty(one.shape[:2]) for one in sets]
    for fold in range(folds):
        left_out = [one[fold::folds] for one in sets]
        means = [
            (total[i] - rows.sum(axis=0, dtype=np.float64)) / (len(sets[i]) - len(rows))
            for i, rows in enumerate(left_out)
        ]
        v, middle = unit(means[0] - means[1]), (means[0] + means[1]) / 2
        for feature, rows in zip(features, left_out, strict=True):
            feature[fold::folds] = np.einsum("nkd,kd->nk", rows, v) - np.einsum("kd,kd->k", middle, v)
    distance = features[0].mean(axis=0) - features[1].mean(axis=0)
    squares = sum(((feature - feature.mean(axis=0)) ** 2).sum(axis=0) for feature in features)
    std = np.sqrt(squares / (len(positive) + len(negative) - 2))
    distance[~difference.any(axis=1)] = 0
    with np.errstate(divide="ignore"):
        return np.divide(distance, std, out=np.zeros_like(distance), where=distance != 0).astype(np.float32)


SHRINKAGE = 0.3
"""lambda, the weight of the identity in the covariance of `_discriminant`."""


def _discriminant(positive: Float32, negative: Float32, difference: np.ndarray) -> Float32 | None:
    """`Contrast.discriminant` of two sets of activations (n, T + 1, d) and (m, T + 1, d).

    w_k = C_k^-1 v_k / (v_k . C_k^-1 v_k) with C = (1 - lambda) S + lambda (tr S / d) I, where S is the covariance
    within the sets (Fisher 1936; shrinkage as in Ledoit and Wolf 2004, with a fixed weight). Of all that read a
    displacement along v_k rightly, w_k answers least to what else varies within the sets. With N prompts in d
    dimensions S has rank N - 2 at most: C^-1 v comes from an N x N system (Woodbury).
    """
    freedom = len(positive) + len(negative) - 2
    if freedom == 0:
        return None
    v = unit(difference[:-1])
    discriminant = np.zeros_like(v)
    for k in np.flatnonzero(v.any(axis=1)):
        X = np.vstack([one[:, k] - one[:, k].mean(axis=0, dtype=np.float64) for one in (positive, negative)])
        floor = SHRINKAGE * (X**2).sum() / (freedom * X.shape[1])
        if not floor:  # all prompts of a set are the same here
            discriminant[k] = v[k]
            continue
        X *= np.sqrt((1 - SHRINKAGE) / freedom)
        solved = (v[k] - X.T @ np.linalg.solve(X @ X.T + floor * np.eye(len(X)), X @ v[k])) / floor
        discriminant[k] = solved / (v[k] @ solved)
    return discriminant.astype(np.float32)


def _same_multiset(positive: Float32, negative: Float32) -> np.ndarray:
    """(T + 1, 1): whether both sets have the very same activations at a layer, in the same proportions.

    Their means then differ by rounding errors alone, and nothing may be steered along such a direction. It happens at
    layer 0 (the embedding of the last token) whenever both sets end in the same tokens.
    """
    same = np.zeros((positive.shape[1], 1), bool)
    for k in range(positive.shape[1]):
        shares = []
        for residuals in (positive[:, k], negative[:, k]):
            rows, counts = np.unique(residuals, axis=0, return_counts=True)
            shares.append((rows, counts / len(residuals)))
        (rows, share), (other_rows, other_share) = shares
        same[k] = len(rows) == len(other_rows) and np.array_equal(rows, other_rows) and np.allclose(share, other_share)
    return same
