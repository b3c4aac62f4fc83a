"""Run a task at every strength, chunk by chunk, and report its metrics.

A task is made of parts: its own, and those that measure damage. A part has a known number of rows, measures any of them
at any strength, and turns rows into metrics. Rows do not depend on earlier ones, and row i is sampled with `seed` + i.
So a run can stop and continue anywhere, and all strengths use the same random numbers (their differences are paired).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from os import PathLike
from typing import Protocol

from mlx_lqr.backends.protocol import Progress, Recorder, Runner
from mlx_lqr.tasks.bootstrap import Estimate, Metric, difference, estimate
from mlx_lqr.tasks.records import CHUNK, Row, kept
from mlx_lqr.tasks.steering import NamedSteering, Steered, check_strengths


class Part(Protocol):
    """One kind of rows."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int:
        """How many rows there are at one strength."""

    def settings(self, model: Runner) -> Row:
        """Everything that the rows depend on except model, steering and strength, as JSON."""

    def rows(self, steered: Steered, indices: range) -> list[Row]:
        """Measure these rows."""

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """The metrics of these rows, under names that no other part of a task uses; the same names for no rows."""


@dataclass(frozen=True)
class Task:
    """Something to evaluate."""

    name: str
    parts: tuple[Part, ...]
    control: str
    """The metric that says how well steering does what it should; higher is better"""
    control_label: str
    """The same in words, for an axis"""

    @property
    def metric_names(self) -> list[str]:
        """The names of all metrics, in order."""
        return [name for part in self.parts for name in part.metrics([])]


@dataclass(frozen=True)
class Result:
    """The metrics at one strength."""

    strength: float
    metrics: dict[str, Estimate]
    change: dict[str, Estimate]
    """The same minus the unsteered model's on the same rows; empty at strength 0 and without an unsteered run"""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A task that was run, with its rows at every strength."""

    task: Task
    method: str
    """The steering's name"""
    header: Row
    rows: dict[float, dict[str, list[Row]]]
    """By strength and part"""

    def results(self, reference: Evaluation | None = None) -> list[Result]:
        """Every metric at every strength with its interval, and its change from strength 0.

        Args:
            reference: a run with strength 0, if this one has none.
        """
        base = (reference or self).rows.get(0.0)
        unsteered = self._metrics(base) if base is not None else {}
        results = []
        for strength, parts in self.rows.items():
            metrics = self._metrics(parts)
            change = {name: difference(metrics[name], unsteered[name]) for name in unsteered if strength != 0}
            results.append(Result(strength, {name: estimate(metric) for name, metric in metrics.items()}, change))
        return results

    def _metrics(self, parts: dict[str, list[Row]]) -> dict[str, Metric]:
        return {name: metric for part in self.task.parts for name, metric in part.metrics(parts[part.name]).items()}


def evaluate(
    model: Recorder,
    task: Task,
    steering: NamedSteering | None = None,
    strengths: Sequence[float] = (0.0,),
    *,
    output: str | PathLike[str] | None = None,
    loading: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Run `task` at every strength.

    Args:
        model: what `mlx_lqr.load` returned.
        task: what `tasks.concept` or another task returned.
        steering: what steers; None for the unsteered model, which only has strength 0.
        strengths: 0 is the unsteered model.
        output: a file of JSON lines; rows are appended as soon as their chunk is done. If it exists, the rows in it are
            not measured again. More strengths may be added to it later.
        loading: how the model was loaded (such as its dtype), for the output's header, since rows depend on it.
        progress: called as progress(f"Strength {s:g}", rows done, all rows).

    Raises:
        InputError: a controller of another model, a strength other than 0 without steering, or an output that was made
            with other settings or that another mlx-lqr writes.
        OverflowingError: activations overflow at a strength; the rows measured before are kept.
    """
    wanted = check_strengths(model, steering, strengths)
    with kept(describe(model, task, steering, loading), output) as records:
        total = sum(len(part) for part in task.parts)
        for strength in wanted:
            steered = Steered(model, steering, strength)
            done = 0
            for part in task.parts:
                known = len(records.of(strength, part.name))
                for start in range(known, len(part), CHUNK):
                    if progress:
                        progress(f"Strength {strength:g}", done + start, total)
                    indices = range(start, min(start + CHUNK, len(part)))
                    records.append(strength, part.name, part.rows(steered, indices))
                done += len(part)
            if progress:
                progress(f"Strength {strength:g}", done, total)
    rows = {strength: {part.name: records.of(strength, part.name) for part in task.parts} for strength in wanted}
    return Evaluation(task, steering.name if steering is not None else "unsteered", records.header, rows)


def describe(
    model: Recorder, task: Task, steering: NamedSteering | None = None, loading: Mapping[str, str | None] | None = None
) -> Row:
    """Everything that an evaluation's rows depend on except the strength."""
    return {
        "task": task.name,
        "model": {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "class": type(model).__name__,
            **(loading or {}),
        },
        "steering": steering.settings if steering is not None else None,
        "parts": {part.name: {"rows": len(part), **part.settings(model)} for part in task.parts},
        "version": metadata.version("mlx-lqr"),
    }
