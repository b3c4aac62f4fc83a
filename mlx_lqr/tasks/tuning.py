"""Tune: the options and the strength that control most within a limit on damage.

Every evaluation runs the task at one strength of one candidate, against one unsteered run over the same prompts with
the same random numbers; search.py says which. The budget is a number of evaluations, the same for any method that has a
`Space`, so that methods tuned with equal budgets compare fairly.

The limit is on the damage relative to the unsteered model: for perplexity their ratio, for every other metric the
difference in the direction that is worse (kl is 0 without steering, so that its limit is the kl itself). It is held to
the numbers found, not to the ends of their intervals. A text that goes round in circles has a low perplexity: trials
that repeat many more 4-grams than the unsteered model does are never within it. The best of several is chosen on the
rows it was measured on and looks a little better than it is: report it on other rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from mlx_lqr.backends.protocol import Differentiable, Progress
from mlx_lqr.errors import InputError, OverflowingError
from mlx_lqr.files.atomic import writing
from mlx_lqr.files.locks import locked
from mlx_lqr.files.results import as_json
from mlx_lqr.files.text import read_text
from mlx_lqr.methods.steering import Steering, load_steering
from mlx_lqr.tasks.bootstrap import Estimate
from mlx_lqr.tasks.records import digest
from mlx_lqr.tasks.run import Evaluation, Result, Task, evaluate
from mlx_lqr.tasks.search import FIRST_DOSE, Measurement, Search, Values
from mlx_lqr.tasks.steering import NamedSteering


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to fit, to be tried at several strengths."""

    name: str
    options: Mapping[str, Any]
    """What it is fitted with, as JSON; tells candidates of a space apart."""
    fit: Callable[[], Steering]
    """Called once at most."""
    strengths: tuple[float, float]
    """From no steering to the strongest that is sensible, in whichever direction this is."""


@dataclass(frozen=True, eq=False)
class Space:
    """What to search through."""

    factors: Mapping[str, Sequence[Any]]
    """Values of each option, as JSON; the first is where the search starts. Earlier factors are varied first."""
    candidate: Callable[[Values], Candidate]
    """The candidate with these values of the factors."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What all candidates depend on, as JSON: prompts, for one. Results in a folder are of the same settings."""
    first_dose: float = FIRST_DOSE
    """Where the search starts, between the candidate's strengths: 0 is the first of them, 1 the second."""


@dataclass(frozen=True)
class Damage:
    """How a damage metric is compared with the unsteered model's."""

    limit: float
    """By default"""
    worse: int
    """1 where more is worse, -1 where less is"""
    ratio: bool = False

    def relative(self, value: float, unsteered: float) -> float:
        return value / unsteered if self.ratio else self.worse * (value - unsteered)

    def excess(self, relative: float) -> float:
        """On a scale on which the unsteered model is at 0, and which rises about evenly with the strength."""
        return math.log(relative) if self.ratio else relative


DAMAGE: Mapping[str, Damage] = {
    "perplexity": Damage(1.3, 1, ratio=True),
    "kl": Damage(1.0, 1),
    "repetition": Damage(0.05, 1),
    "distinct_2": Damage(0.05, -1),
    "capability": Damage(0.1, -1),
    "accuracy": Damage(0.1, -1),
}

REPETITION = 0.1
"""More of it than the unsteered model has counts as beyond any limit."""


@dataclass(frozen=True)
class Trial:
    """One evaluation."""

    candidate: str
    options: Mapping[str, Any]
    strength: float
    control: Estimate
    damage: Estimate
    """Infinite where the activations overflow"""
    relative: float
    """The damage relative to the unsteered model, which the limit is on"""
    within: bool
    repeats: bool = False
    """Whether the texts go round in circles, so that it is not within the limit whatever the damage metric says"""


@dataclass(frozen=True, eq=False)
class Tuned:
    """What was found."""

    control: str
    """The metric"""
    damage: str
    """The metric"""
    limit: float
    unsteered: Result
    trials: tuple[Trial, ...]
    best: Trial | None
    """The most control within the limit, and of equal ones the least damage; None where no trial within it controls
    more than the unsteered model does"""
    steering: Steering | None
    """What was fitted there, with the recommended strength"""


def tune(
    model: Differentiable,
    task: Task,
    space: Space,
    *,
    control: str | None = None,
    damage: str = "perplexity",
    limit: float | None = None,
    evaluations: int = 16,
    folder: str | PathLike[str] | None = None,
    loading: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Search `space` for the most control within the limit.

    Args:
        model, task, loading: see `evaluate`. Parts of the task that measure neither control nor damage are left out.
        space: see `spaces.py`, or one of your own.
        control: the metric that is to be high; by default the task's.
        damage: one of `DAMAGE`.
        limit: perplexity: at most this many times that of the unsteered model; others: at most so much worse than it.
        evaluations: how many settings may be run, the unsteered one not counted.
        folder: where rows, fitted candidates and the list of trials go; what is there is not measured or fitted again.
        progress: called as progress(f"Trial {i} of {n}", rows done, rows in all).

    Raises:
        InputError: metrics that the task does not have, a limit that nothing could be within, a folder that another
            mlx-lqr writes, or see `evaluate`.
    """
    control = control or task.control
    limit = check_limit(task, control, damage, limit)
    if evaluations < 1:
        raise InputError(f"evaluations must be at least 1, not {evaluations}")
    place = Path(folder) if folder is not None else None
    with locked(place) if place is not None else nullcontext():
        run = _Run(model, task, space, control, damage, limit, evaluations, place, loading, progress)
        Search(space.factors, run.measure, evaluations, DAMAGE[damage].excess(limit), space.first_dose).run()
        return run.tuned()


def check_limit(task: Task, control: str, damage: str, limit: float | None) -> float:
    """The limit, or where it is None the metric's own.

    Raises:
        InputError: metrics that the task does not have, or a limit that the unsteered model itself is not below.
    """
    for metric in (control, damage):
        if metric not in task.metric_names:
            raise InputError(f"{task.name} does not measure {metric}: choose one of {', '.join(task.metric_names)}")
    if damage not in DAMAGE:
        raise InputError(f"{damage} is no measure of damage: choose one of {', '.join(DAMAGE)}")
    limit = DAMAGE[damage].limit if limit is None else limit
    least = 1 if DAMAGE[damage].ratio else 0
    if not (math.isfinite(limit) and limit > least):
        raise InputError(f"the limit on {damage} must be above {least}, the unsteered model's own, not {limit:g}")
    return limit


@dataclass(eq=False)
class _Run:
    """The trials so far, and what makes the next one."""

    model: Differentiable
    task: Task
    space: Space
    control: str
    damage: str
    limit: float
    evaluations: int
    folder: Path | None
    loading: Mapping[str, str | None] | None
    progress: Progress | None
    trials: list[Trial] = field(default_factory=list)
    fitted: dict[str, Steering] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = [part for part in self.task.parts if {self.control, self.damage} & set(part.metrics([]))]
        self.task = replace(self.task, parts=tuple(wanted))
        self.reference = self._evaluate(None, 0.0, "unsteered", "Unsteered")
        self.unsteered = self.reference.results()[0]

    def measure(self, options: Values, dose: float) -> Measurement:
        """Run the task, or take what an earlier run has left."""
        candidate = self.space.candidate(options)
        mild, strong = candidate.strengths
        strength = float(f"{mild + dose * (strong - mild):.3g}")
        steering = NamedSteering(candidate.name, self._fit(candidate))
        kind, stage = DAMAGE[self.damage], f"Trial {len(self.trials) + 1} of {self.evaluations}"
        try:
            evaluation = self._evaluate(steering, strength, self._key(candidate.options), stage)
            metrics = evaluation.results(self.reference)[0].metrics
            control, damage = metrics[self.control], metrics[self.damage]
            repeats = self._repeats(metrics)
        except OverflowingError:
            worst, repeats = math.inf * kind.worse, False
            control, damage = Estimate(math.nan, math.nan, math.nan, 0), Estimate(worst, worst, worst, 0)
        relative = kind.relative(damage.value, self.unsteered.metrics[self.damage].value)
        within = relative <= self.limit and math.isfinite(control.value) and not repeats
        options = dict(candidate.options)
        self.trials.append(Trial(candidate.name, options, strength, control, damage, relative, within, repeats))
        self._log()
        return Measurement(control.value, kind.excess(relative) if within or relative > self.limit else math.inf)

    def _repeats(self, metrics: Mapping[str, Estimate]) -> bool:
        if self.damage == "repetition" or "repetition" not in metrics:
            return False
        return metrics["repetition"].value > self.unsteered.metrics["repetition"].value + REPETITION

    def tuned(self) -> Tuned:
        unsteered = self.unsteered.metrics[self.control].value
        within = [trial for trial in self.trials if trial.within and trial.control.value > unsteered]
        best = max(within, key=lambda trial: (trial.control.value, -trial.relative), default=None)
        steering = None
        if best is not None:
            chosen = self.fitted[self._key(best.options)]
            steering = chosen.recommending((best.strength,) * len(chosen.concepts))
        return Tuned(self.control, self.damage, self.limit, self.unsteered, tuple(self.trials), best, steering)

    def _evaluate(self, steering: NamedSteering | None, strength: float, key: str, stage: str) -> Evaluation:
        output = self.folder / f"{self.task.name}-{key}.jsonl" if self.folder is not None else None
        progress = self.progress
        report = (lambda _, done, total: progress(stage, done, total)) if progress is not None else None
        return evaluate(
            self.model, self.task, steering, [strength], output=output, loading=self.loading, progress=report
        )

    def _key(self, options: Mapping[str, Any]) -> str:
        """Tells a candidate's files from those of others in the folder, whatever these were made for."""
        return digest([self.model.fingerprint, dict(self.space.settings), dict(options)])

    def _fit(self, candidate: Candidate) -> Steering:
        key = self._key(candidate.options)
        if key not in self.fitted:
            file = self.folder / f"{key}.safetensors" if self.folder is not None else None
            if file is not None and file.is_file():
                self.fitted[key] = load_steering(file)
            else:
                self.fitted[key] = candidate.fit()
                if file is not None:
                    self.fitted[key].save(file)
        return self.fitted[key]

    def _log(self) -> None:
        """Add the last trial to the folder's list, unless it is there; those of other searches stay."""
        if self.folder is None:
            return
        row = {
            "task": self.task.name,
            "metrics": {"control": self.control, "damage": self.damage},
            "limit": self.limit,
            **as_json(self.trials[-1]),
            "settings": dict(self.space.settings),
        }
        file, line = self.folder / "trials.jsonl", json.dumps(row) + "\n"
        known = read_text(file) if file.is_file() else ""
        if line not in known.splitlines(keepends=True):
            with writing(file) as temporary:
                temporary.write_text(known + line, "utf-8")
