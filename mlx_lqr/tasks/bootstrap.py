"""Percentile bootstrap intervals (Efron 1979) for shares, means and ratios of sums, and for paired differences.

Every metric is a function of sums over rows, f(sum_i x_i). Rows that belong together (several samples of one prompt)
form a group, and groups are resampled: with weights n ~ Multinomial(G, 1/G) a resample is f(n @ X), with X (G, k) the
groups' sums. The difference of two runs over the same prompts uses the same weights for both, which removes the
variance that comes from the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]
RESAMPLES = 2000
LEVEL = 0.95
_AT_ONCE = 100


def ratio(sums: Float64) -> Float64:
    """sums[..., 0] / sums[..., 1]; NaN where the count is zero."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] != 0)


def exponential_ratio(sums: Float64) -> Float64:
    """exp(sums[..., 0] / sums[..., 1])"""
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums))


@dataclass(frozen=True, eq=False)
class Metric:
    """A function of sums over rows."""

    terms: Float64
    """(n, k): what each row adds to the k sums"""
    groups: NDArray[np.int64]
    """(n,): rows with the same number are resampled together"""
    of: Callable[[Float64], Float64] = ratio
    """(..., k) -> (...)"""
    share: bool = False
    """Whether it is a share of rows with a property. If all rows agree, its interval is exact (see `estimate`)"""

    @property
    def totals(self) -> Float64:
        """(G, k): the sums of each group, in the groups' order"""
        _, index = np.unique(self.groups, return_inverse=True)
        totals = np.zeros((int(index.max()) + 1 if len(index) else 0, self.terms.shape[1]))
        np.add.at(totals, index, self.terms)
        return totals


@dataclass(frozen=True)
class Estimate:
    """A number and its interval, 95 % unless said otherwise."""

    value: float
    low: float
    high: float
    rows: int
    """The number of rows"""


def mean(values: ArrayLike, groups: Sequence[int], *, share: bool = False) -> Metric:
    """The mean of the values, without those that are NaN (not defined for their row)."""
    numbers = np.asarray(values, np.float64)
    known = np.isfinite(numbers)
    terms = np.stack([np.where(known, numbers, 0.0), known.astype(np.float64)], axis=1)
    return Metric(terms, np.asarray(groups, np.int64), share=share)


def estimate(metric: Metric, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The metric with its percentile interval.

    If all groups agree on 0 or on 1, resampling would claim certainty. A share then gets the exact bound of Clopper and
    Pearson (1934) for G groups: from 0 to 1 - 0.025^(1/G), or from 0.025^(1/G) to 1.
    """
    totals = metric.totals
    value = float(metric.of(totals.sum(axis=0)))
    low, high = _interval([metric.of(sums) for sums in _resampled(totals, seed, resamples)])
    if metric.share and value in (0.0, 1.0):
        margin = 1 - ((1 - LEVEL) / 2) ** (1 / np.count_nonzero(totals[:, 1]))
        low, high = (0.0, margin) if value == 0 else (1 - margin, 1.0)
    return Estimate(value, low, high, len(metric.terms))


def difference(metric: Metric, reference: Metric, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """metric - reference, resampled together.

    Raises:
        ValueError: the two have different groups.
    """
    return differences([(metric, reference)], seed=seed, resamples=resamples)[0]


def differences(
    pairs: Sequence[tuple[Metric, Metric]], *, level: float = LEVEL, seed: int = 0, resamples: int = RESAMPLES
) -> list[Estimate]:
    """first - second of each pair, all resampled together.

    Args:
        pairs: metrics that all have the same groups.
        level: of each interval. A level close to 1 needs many resamples: `resamples` (1 - level) / 2 of them lie
            beyond either end.

    Raises:
        ValueError: metrics of different groups.
    """
    metrics = [metric for pair in pairs for metric in pair]
    for metric in metrics:
        if not np.array_equal(np.unique(metric.groups), np.unique(metrics[0].groups)):
            raise ValueError("a paired difference needs the same groups on both sides")
    if not pairs:
        return []
    totals = [metric.totals for metric in metrics]
    columns = np.cumsum([0, *(own.shape[1] for own in totals)])
    batches = _resampled(np.concatenate(totals, axis=1), seed, resamples)
    estimates = []
    for i, (first, second) in enumerate(pairs):
        own, theirs = slice(*columns[2 * i : 2 * i + 2]), slice(*columns[2 * i + 1 : 2 * i + 3])
        value = float(first.of(totals[2 * i].sum(axis=0)) - second.of(totals[2 * i + 1].sum(axis=0)))
        low, high = _interval([first.of(sums[:, own]) - second.of(sums[:, theirs]) for sums in batches], level)
        estimates.append(Estimate(value, low, high, len(first.terms)))
    return estimates


def _resampled(totals: Float64, seed: int, resamples: int) -> list[Float64]:
    """Sums (b, k) of resampled groups, in batches; the weights depend on the seed and the number of groups alone."""
    random = np.random.default_rng(seed)
    G = len(totals)
    counts = [min(_AT_ONCE, resamples - done) for done in range(0, resamples, _AT_ONCE)]
    return [random.multinomial(G, np.full(G, 1 / G), size=count) @ totals for count in counts] if G else []


def _interval(parts: Sequence[Any], level: float = LEVEL) -> tuple[float, float]:
    values = np.concatenate(parts) if parts else np.empty(0)
    values = values[~np.isnan(values)]
    if not values.size:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
