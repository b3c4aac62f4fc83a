"""Run a task at every strength, chunk by chunk, and say what was found.

A task is made of parts: what it is about, and the damage. A part has a known number of rows, measures any of them at
any strength, and turns rows into metrics. Rows do not depend on what was measured before, and the sampling of row i on
`seed` + i alone, so that a run may stop and go on anywhere, and all strengths draw the same random numbers (paired).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from os import PathLike
from typing import Any, Protocol

from mlx_lqr.backends.protocol import Model, Progress
from mlx_lqr.tasks.bootstrap import Estimate, Metric, difference, estimate
from mlx_lqr.tasks.records import CHUNK, Records, Row
from mlx_lqr.tasks.steering import NamedSteering, Steered, check_strengths


class Part(Protocol):
    """One kind of rows."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int:
        """How many rows there are at one strength."""

    def settings(self, model: Model) -> Row:
        """Everything but model, steering and strength that the rows depend on, as JSON."""

    def rows(self, steered: Steered, indices: range) -> list[Row]:
        """Measure these rows."""

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """What the rows come to, under names that no other part of a task uses; the names are those of no rows, too."""


@dataclass(frozen=True)
class Task:
    """Something to evaluate."""

    name: str
    parts: tuple[Part, ...]
    control: str
    """The metric that says how well steering does what it is for; higher is better"""
    control_label: str
    """The same in words, for an axis"""

    @property
    def metric_names(self) -> list[str]:
        """Everything that is measured."""
        return [name for part in self.parts for name in part.metrics([])]


@dataclass(frozen=True)
class Result:
    """What was found at one strength."""

    strength: float
    metrics: dict[str, Estimate]
    change: dict[str, Estimate]
    """The same less that of the unsteered model on the same rows; empty where there is no such reference"""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A task that was run, at every strength asked for."""

    task: Task
    method: str
    """The steering's name"""
    header: Row
    rows: dict[float, dict[str, list[Row]]]
    """By strength and part"""

    def results(self, reference: Evaluation | None = None) -> list[Result]:
        """Every metric at every strength with its interval, and its change from strength 0.

        Args:
            reference: a run that has strength 0, where this one has not.
        """
        base = (reference or self).rows.get(0.0)
        unsteered = self._metrics(base) if base is not None else {}
        found = []
        for strength, parts in self.rows.items():
            metrics = self._metrics(parts)
            change = {name: difference(metrics[name], unsteered[name]) for name in unsteered if strength != 0}
            found.append(Result(strength, {name: estimate(metric) for name, metric in metrics.items()}, change))
        return found

    def _metrics(self, parts: dict[str, list[Row]]) -> dict[str, Metric]:
        return {name: metric for part in self.task.parts for name, metric in part.metrics(parts[part.name]).items()}


def evaluate(
    model: Model,
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
        task: what `tasks.concept` and the like made.
        steering: what steers; None for the unsteered model, which has strength 0 alone.
        strengths: 0 is the unsteered model.
        output: a file of JSON lines that gets every row as soon as its chunk is done. Where it exists, rows that are in
            it are not measured again; more strengths may be added to it.
        loading: how the model was loaded (its dtype, for one), for the output's header: rows depend on it.
        progress: called as progress(f"Strength {s:g}", rows done, rows in all).

    Raises:
        InputError: a controller of another model, a strength other than 0 without steering, an output of other
            settings, or a strength at which activations overflow (what was measured before is kept).
    """
    wanted = check_strengths(model, steering, strengths)
    records = Records(describe(model, task, steering, loading), output)
    total = sum(len(part) for part in task.parts)
    for strength in wanted:
        steered = Steered(model, steering, strength)
        done = 0
        for part in task.parts:
            have = len(records.of(strength, part.name))
            for start in range(have, len(part), CHUNK):
                if progress:
                    progress(f"Strength {strength:g}", done + start, total)
                indices = range(start, min(start + CHUNK, len(part)))
                records.append(strength, part.name, part.rows(steered, indices))
            done += len(part)
        if progress:
            progress(f"Strength {strength:g}", done, total)
    found = {strength: {part.name: records.of(strength, part.name) for part in task.parts} for strength in wanted}
    return Evaluation(task, steering.name if steering is not None else "unsteered", records.header, found)


def describe(
    model: Model, task: Task, steering: NamedSteering | None = None, loading: Mapping[str, str | None] | None = None
) -> Row:
    """All that an evaluation's rows depend on but the strength."""
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


def digest(content: Any) -> str:
    """Tells settings too long for a header from others."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
