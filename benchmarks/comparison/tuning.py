"""The search: the same number of evaluations for every method, and the most control within a limit on damage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_lqr import baseline, tasks
from mlx_lqr.backends.base import Model, Progress
from mlx_lqr.tasks.bootstrap import Estimate

Options = dict[str, Any]
FIRST_DOSE = 0.4


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to fit, to be tried at several strengths."""

    name: str
    options: Mapping[str, Any]
    fit: Callable[[], baseline.Steering]
    strengths: tuple[float, float]
    """From no steering to the strongest that is sensible"""


@dataclass(frozen=True, eq=False)
class Space:
    """What to search through."""

    factors: Mapping[str, Sequence[Any]]
    """The values of one option"""
    candidate: Callable[[Options], Candidate]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What all candidates depend on, as JSON"""


@dataclass(frozen=True)
class Trial:
    """One evaluation."""

    candidate: str
    options: Mapping[str, Any]
    strength: float
    control: Estimate
    damage: Estimate
    relative: float
    """The damage over that of the unsteered model, which the limit is on"""
    within: bool


@dataclass(frozen=True, eq=False)
class Tuned:
    """What was found."""

    trials: tuple[Trial, ...]
    best: Trial | None
    """The most control within the limit; None where no trial is within it"""
    steering: baseline.Steering | None
    """What was fitted there, with the recommended strength"""


def tune(
    model: Model,
    task: tasks.Task,
    space: Space,
    *,
    limit: float,
    evaluations: int,
    folder: Path,
    loading: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Bisect each candidate's strength for the largest perplexity within the limit.

    Args:
        space: of one factor; the evaluations are dealt out evenly among its values.
        limit: the largest ratio of a trial's perplexity to that of the unsteered model.
        folder: where rows go; what is there of the same settings is not run again.
    """
    options: Any = {"loading": loading, "progress": progress}
    reference = tasks.evaluate(model, task, output=folder / "unsteered.jsonl", **options)
    unsteered = reference.results()[0].metrics["perplexity"].value
    trials = []
    ((factor, values),) = space.factors.items()
    candidates = [space.candidate({factor: value}) for value in values]
    for number, candidate in enumerate(candidates):
        steering = tasks.Steering(candidate.name, candidate.fit())
        mild, strong = candidate.strengths
        low, high, dose = 0.0, 1.0, FIRST_DOSE
        for _ in range(evaluations // len(candidates) + (number < evaluations % len(candidates))):
            strength = float(f"{mild + dose * (strong - mild):.3g}")
            output = folder / f"candidate-{number}.jsonl"
            found = tasks.evaluate(model, task, steering, [strength], output=output, **options).results(reference)[0]
            control, damage = found.metrics[task.control], found.metrics["perplexity"]
            relative = damage.value / unsteered
            within = relative <= limit
            trials.append(Trial(candidate.name, candidate.options, strength, control, damage, relative, within))
            low, high = (dose, high) if within else (low, dose)
            dose = (low + high) / 2
    best = max((t for t in trials if t.within), key=lambda trial: (trial.control.value, -trial.relative), default=None)
    if best is None:
        return Tuned(tuple(trials), None, None)
    fitted = space.candidate(dict(best.options)).fit()
    return Tuned(tuple(trials), best, replace(fitted, strength=(best.strength,)))
