"""Where to try next: a search for the most control within a limit on damage, in a handful of measurements.

What is searched has some factors, each with a few values, the first of which is where the search starts, and a dose,
from 0 (no steering) to 1 (as strong as is sensible). It is not a grid:

1. The start is measured at a few doses, until its damage is near the limit: damage rises with the dose, so that two
   doses on either side of the limit are interpolated, and below it the dose grows.
2. One factor after the other takes its other values, at the dose that was best so far; each is measured once, and again
   where the first measurement leaves something open. What controls more within the limit is kept (coordinate descent).
3. What is left of the budget goes into the dose of what is best, then of what comes after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Values = dict[str, Any]
"""A value for each factor."""

FIRST_DOSE = 0.4
AIM = 0.9
"""Share of the allowed excess that doses aim at: beyond it a candidate's dose is not worth another measurement."""
SLACK = 0.8
"""A candidate below this share is measured again: at a higher dose it may control more."""
BLIND, GROWTH = 1.75, 3.0
"""How many times a dose may be the one before: where no excess was seen, and where it says how far there is to go. Of
two candidates one may need three times the other's dose: a push early in the model does less."""
NARROW = 0.04
"""Doses closer than this share of themselves are not told apart."""
START_TRIES, TRIES, REFINING = 3, 2, 2
"""Measurements at the start, of every other candidate, and those kept for the dose of the best."""


@dataclass(frozen=True)
class Measurement:
    """What was measured."""

    control: float
    """More is better; NaN where nothing could be measured"""
    excess: float
    """The damage, on a scale on which the unsteered model is at 0; infinite where nothing could be measured"""


def next_dose(points: Sequence[tuple[float, float]], allowed: float) -> float | None:
    """The dose to try after these (dose, excess), or None where the limit is as good as reached.

    Args:
        points: of one candidate.
        allowed: the excess at the limit, above zero.
    """
    aim = AIM * allowed
    out, excess_out = min(((dose, excess) for dose, excess in points if excess > allowed), default=(math.inf, 0.0))
    inside, excess_in = max(point for point in [(0.0, 0.0), *points] if point[0] < out and point[1] <= allowed)
    if excess_in >= aim or inside == 1:
        return None
    if math.isinf(out):
        if inside == 0:
            return FIRST_DOSE
        growth = BLIND if excess_in <= 0 else min(GROWTH, max(1.15, math.sqrt(aim / excess_in)))
        return min(1.0, inside * growth)
    if out - inside < NARROW * out:
        return None
    share = (aim - excess_in) / (excess_out - excess_in) if math.isfinite(excess_out) else 0.5
    return inside + (out - inside) * min(0.8, max(0.2, share))


class Search:
    """The search.

    Args:
        factors: their values, in the order in which they are varied.
        measure: (options, dose) -> what was measured there.
        evaluations: how often it may be called.
        allowed: the excess at the limit.
        first: the dose to begin with.
    """

    def __init__(
        self,
        factors: Mapping[str, Sequence[Any]],
        measure: Callable[[Values, float], Measurement],
        evaluations: int,
        allowed: float,
        first: float = FIRST_DOSE,
    ) -> None:
        self._factors, self._measure, self._allowed = factors, measure, allowed
        self._left, self._first = evaluations, first
        self._tried: list[tuple[Values, list[tuple[float, Measurement]]]] = []

    def run(self) -> None:
        """Measure until the budget is used up, or until nothing is left to try."""
        best: Values = {name: values[0] for name, values in self._factors.items()}
        self._follow(best, START_TRIES, self._first)
        before = None
        while self._left and self._left != before:
            before = self._left
            best = self._vary(best)
            if self._left <= REFINING or self._left == before:
                self._follow(best, self._left, self._first)
        for options, _ in sorted(self._tried, key=lambda tried: self._rank(tried[0]), reverse=True):
            self._follow(options, self._left, self._first)

    def _vary(self, best: Values) -> Values:
        """The other values of every factor, one after the other, values not tried yet first; returns the best there is
        now."""
        values = [(name, value) for name, values in self._factors.items() for value in values]
        for name, value in sorted(values, key=lambda pair: any(tried[pair[0]] == pair[1] for tried, _ in self._tried)):
            other = {**best, name: value}
            kept = REFINING if self._next(best) is not None else 0
            if self._left > kept and not self._points(other):
                self._follow(other, TRIES, self._dose(best), rival=best)
                if self._rank(other) > self._rank(best):
                    best = other
        return best

    def _follow(self, options: Values, times: int, first: float, rival: Values | None = None) -> None:
        """Measure at up to `times` more doses, towards the limit; against a rival, no more than is needed to decide."""
        for _ in range(min(times, self._left)):
            points = self._points(options)
            dose = self._next(options) if points else first
            if dose is None or (rival is not None and points and self._decided(points, rival)):
                return
            if not points:
                self._tried.append((options, []))
            self._points(options).append((dose, self._measure(options, dose)))
            self._left -= 1

    def _decided(self, points: Sequence[tuple[float, Measurement]], rival: Values) -> bool:
        last = points[-1][1]
        if last.excess <= self._allowed:
            return last.excess > SLACK * self._allowed
        return last.control <= self._rank(rival)[0]  # a lower dose would control even less

    def _next(self, options: Values) -> float | None:
        return next_dose([(dose, measured.excess) for dose, measured in self._points(options)], self._allowed)

    def _points(self, options: Values) -> list[tuple[float, Measurement]]:
        return next((points for tried, points in self._tried if tried == options), [])

    def _within(self, options: Values) -> list[tuple[float, Measurement]]:
        return [(dose, measured) for dose, measured in self._points(options) if measured.excess <= self._allowed]

    def _rank(self, options: Values) -> tuple[float, float]:
        """The most control within the limit, and of equal ones the least damage."""
        return max(
            ((measured.control, -measured.excess) for _, measured in self._within(options)), default=(-math.inf, 0.0)
        )

    def _dose(self, options: Values) -> float:
        """The best dose within the limit, or the lowest of those tried."""
        within = self._within(options)
        if within:
            return max(within, key=lambda point: (point[1].control, -point[1].excess))[0]
        return min(dose for dose, _ in self._points(options))
