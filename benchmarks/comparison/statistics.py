"""Differences between methods, and what can be said of them.

Every method is compared with A-LQR at every budget: within an experiment on a model that is m comparisons. Their
intervals are Bonferroni's, each of level 1 - 0.05 / m, so that all of them hold at once in 95 % of such experiments.
They are percentile intervals over prompts, of so many resamples that a dozen lie beyond each end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

from mlx_lqr.lqr.strength import Budget
from mlx_lqr.tasks.bootstrap import LEVEL, Estimate, Metric, differences

RESAMPLES = 20_000
Verdict = Literal["+", "-", "="]
"""A-LQR is ahead, is behind, or cannot be told apart."""
Key = tuple[str, Budget]
"""A method and a budget"""


def pooled(metrics: Sequence[Metric]) -> Metric:
    """One metric of several tasks over the same prompts: rows of one prompt stay together."""
    first = metrics[0]
    terms, groups = (np.concatenate([getattr(metric, name) for metric in metrics]) for name in ("terms", "groups"))
    return Metric(terms, groups, first.of, first.share)


def by_prompt(metric: Metric) -> list[list[float]]:
    """Its k sums over each prompt's rows, k lists of one number a prompt: all that a paired difference needs."""
    return [[float(f"{number:.4g}") for number in sums] for sums in metric.totals.T]


def of_prompts(sums: Sequence[Sequence[float]], like: Metric) -> Metric:
    """The metric of another method, from what `by_prompt` told of it.

    Args:
        like: the same metric of the same prompts.
    """
    return Metric(np.asarray(sums, np.float64).T, np.unique(like.groups), like.of, like.share)


def leads(
    ours: Mapping[Budget, Metric], theirs: Mapping[Key, Metric], *, resamples: int = RESAMPLES
) -> dict[Key, Estimate]:
    """Our control minus that of each method at the same budget, with intervals that hold all at once.

    Args:
        ours: the metric of control at each budget.
        theirs: the same for each method and budget; budgets that we do not have are left out.
    """
    keys = [key for key in theirs if key[1] in ours]
    level = 1 - (1 - LEVEL) / max(1, len(keys))  # Bonferroni
    pairs = [(ours[budget], theirs[method, budget]) for method, budget in keys]
    return dict(zip(keys, differences(pairs, level=level, resamples=resamples), strict=True))


def verdict(low: float, high: float) -> Verdict:
    """What the interval of a lead says."""
    return "+" if low > 0 else "-" if high < 0 else "="


def at_control(wanted: float, points: Sequence[tuple[float, float]]) -> float | None:
    """What is left of something where control has risen to `wanted`, or None where it does not rise so far.

    Args:
        points: (control, what is left) without steering and at each budget in order; straight lines between them.
    """
    if points[0][0] >= wanted:
        return points[0][1]
    for (before, left), (after, right) in pairwise(points):
        if before <= wanted <= after:
            return left if after == before else left + (right - left) * (wanted - before) / (after - before)
    return None
