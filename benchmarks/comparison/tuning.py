"""The search: the same number of evaluations for every method, and the most control within a limit on damage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lqr import baseline, tasks
from mlx_lqr.backends.base import Model, Progress
from mlx_lqr.tasks.bootstrap import Estimate


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to fit a method, to be tried at strengths."""

    name: str
    options: Mapping[str, Any]
    """JSON-able; what tells this candidate from the others"""
    fit: Callable[[], baseline.Steering]
    strengths: tuple[float, float]
    """The weakest and the strongest that make sense, of one sign, neither of them 0"""


@dataclass(frozen=True, eq=False)
class Trial:
    """A candidate at one strength."""

    candidate: Candidate
    strength: float
    control: Estimate
    damage: Estimate
    ratio: float
    """Of the damage to that of the unsteered model"""
    allowed: bool


@dataclass(frozen=True, eq=False)
class Tuned:
    """Every trial in its order, and the best within the limit."""

    trials: list[Trial]
    best: Trial | None
    """None where no trial is within the limit"""


def tune(
    model: Model,
    task: tasks.Task,
    space: Sequence[Candidate],
    *,
    damage: str = "perplexity",
    limit: float = 1.3,
    evaluations: int = 8,
    folder: Path,
    loading: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Bisect each candidate's strength, on a log scale, for the largest damage within the limit.

    Args:
        space: the evaluations are dealt out evenly among these.
        limit: the largest ratio of a trial's damage to that of the unsteered model.
        folder: where rows go; what is there of the same settings is not run again.
    """
    options: Any = {"loading": loading, "progress": progress}
    reference = tasks.evaluate(model, task, output=folder / "unsteered.jsonl", **options)
    unsteered = reference.results()[0].metrics[damage].value
    trials = []
    for number, candidate in enumerate(space):
        steering = tasks.Steering(candidate.name, candidate.fit())
        weak, strong = candidate.strengths
        for _ in range(evaluations // len(space) + (number < evaluations % len(space))):
            strength = float(f"{math.sqrt(weak * strong):.3g}")
            output = folder / f"{candidate.name}-{number}.jsonl"
            found = tasks.evaluate(model, task, steering, [strength], output=output, **options).results(reference)[0]
            control, harm = found.metrics[task.control], found.metrics[damage]
            allowed = harm.value <= limit * unsteered
            trials.append(Trial(candidate, strength, control, harm, harm.value / unsteered, allowed))
            weak, strong = (strength, strong) if allowed else (weak, strength)
    within = [trial for trial in trials if trial.allowed]
    best = max(within, key=lambda trial: (trial.control.value, -trial.ratio), default=None)
    return Tuned(trials, best)
