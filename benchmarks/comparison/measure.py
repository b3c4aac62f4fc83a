"""One experiment on one model: fit, tune and report every method, and keep what was found as JSON.

Whatever is done already is read from the output folder, so that an interrupted run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.comparison.experiments import Experiment, Setting
from benchmarks.comparison.methods import METHODS, PAPER, REMOVES, Fitter, space
from benchmarks.comparison.tuning import Trial, tune
from mlx_lqr import tasks
from mlx_lqr.analysis import write_json
from mlx_lqr.backends.base import Progress
from mlx_lqr.tasks.bootstrap import Estimate

LIMIT = 1.3
CURVE = (0.6, 1.5)
"""Besides the recommended strength, multiples of it"""
RIVALS = 3
"""That get a curve beside A-LQR's: those with the most control while tuning"""


@dataclass(frozen=True, eq=False)
class Chosen:
    """What tuning recommends of a method; None where no trial stayed within the limit."""

    method: str
    trials: list[Trial]
    best: Trial | None


def measure(
    experiment: Experiment,
    setting: Setting,
    folder: Path,
    *,
    methods: Sequence[str] = METHODS,
    loading: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Run one experiment; return the JSON file of what was found.

    Args:
        setting: its model is the one that is steered.
        folder: of this experiment and model; everything goes there.
        methods: those of `METHODS` to take; a method that only removes is left out where nothing is to be removed.
    """
    options: Any = {"loading": loading, "progress": progress}
    positive, negative = experiment.contrast(setting)
    fitter = Fitter(setting.model, positive, negative, experiment.name, folder / "fitted")
    tuning, report = experiment.task(setting, "tune"), experiment.task(setting, "report")
    chosen = []
    for method in methods:
        if method in REMOVES and not experiment.removes:
            continue
        if progress:
            progress(f"{experiment.name}: {method}", 0, 0)
        candidates = space(fitter, method)
        found = tune(
            setting.model,
            tuning,
            candidates,
            limit=LIMIT,
            evaluations=setting.sizes.evaluations,
            folder=folder / "tune" / _safe(method),
            **options,
        )
        chosen.append(Chosen(method, found.trials, found.best))
    unsteered = tasks.evaluate(setting.model, report, output=folder / "report" / "unsteered.jsonl", **options)
    runs: dict[str, tasks.Evaluation] = {}
    for one in chosen:
        if one.best is None:
            continue
        if progress:
            progress(f"{experiment.name}: report of {one.method}", 0, 0)
        steering = tasks.Steering(one.best.candidate.name, one.best.candidate.fit())
        strengths = [one.best.strength]
        if experiment.curve and one.method in _with_curve(chosen):
            strengths += [float(f"{factor * one.best.strength:.3g}") for factor in CURVE]
        output = folder / "report" / f"{_safe(one.method)}.jsonl"
        runs[one.method] = tasks.evaluate(setting.model, report, steering, strengths, output=output, **options)
    result = {
        "experiment": experiment.name,
        "model": setting.model.name,
        "judge": setting.judge.model.name if setting.judge.model else setting.model.name,
        "version": metadata.version("mlx-lqr"),
        "sizes": asdict(setting.sizes),
        "prompts": [len(positive), len(negative)],
        "rows": {part.name: len(part) for part in report.parts},
        "tuning_rows": {part.name: len(part) for part in tuning.parts},
        "decoding": {name: _decoding(task) for name, task in (("tune", tuning), ("report", report))},
        "limit": LIMIT,
        "control": report.control,
        "control_label": report.control_label,
        "unsteered": _plain(unsteered.results()[0].metrics),
        "methods": [_method(one, runs, unsteered) for one in chosen],
    }
    path = folder / "result.json"
    write_json(path, result)
    return path


def _with_curve(chosen: Sequence[Chosen]) -> set[str]:
    """A-LQR, and the rivals with the most control while tuning."""
    rivals = [one for one in chosen if one.method not in ("alqr", PAPER) and one.best is not None]
    rivals.sort(key=lambda one: one.best.control.value if one.best else 0.0, reverse=True)
    return {"alqr", *(one.method for one in rivals[:RIVALS])}


def _method(one: Chosen, runs: Mapping[str, tasks.Evaluation], unsteered: tasks.Evaluation) -> dict[str, Any]:
    """All there is to say about a method: its trials, what was recommended, and its results beside the others'."""
    trials = [
        {
            "options": dict(trial.candidate.options),
            "strength": trial.strength,
            "control": _interval(trial.control),
            "damage": _interval(trial.damage),
            "ratio": trial.ratio,
            "within": trial.allowed,
        }
        for trial in one.trials
    ]
    found: dict[str, Any] = {"method": one.method, "trials": trials, "best": None}
    if one.best is None:
        return found
    results = runs[one.method].results(unsteered)
    recommended = next(result for result in results if result.strength == one.best.strength)
    found |= {
        "best": {"options": dict(one.best.candidate.options), "strength": one.best.strength},
        "metrics": _plain(recommended.metrics),
        "change": _plain(recommended.change),
        "curve": [{"strength": result.strength, "metrics": _plain(result.metrics)} for result in results],
    }
    if "alqr" in runs and one.method != "alqr":
        own = runs[one.method]
        alqr = runs["alqr"]
        first = replace(alqr, rows={0.0: next(iter(alqr.rows.values()))})
        only = replace(own, rows={one.best.strength: own.rows[one.best.strength]})
        found["against_alqr"] = _plain(only.results(first)[0].change)
    return found


def _decoding(task: tasks.Task) -> dict[str, Any]:
    """How the task's texts are drawn."""
    part: Any = next(part for part in task.parts if hasattr(part, "decoding"))
    return asdict(part.decoding)


def _plain(metrics: Mapping[str, Estimate]) -> dict[str, list[float]]:
    return {name: _interval(found) for name, found in metrics.items()}


def _interval(found: Estimate) -> list[float]:
    return [found.value, found.low, found.high]


def _safe(method: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in method).strip("-")


def load_results(folder: Path) -> list[dict[str, Any]]:
    """Every result under an output folder, in a fixed order, with the steered model's `key`, its folder's name."""
    paths = sorted(folder.glob("*/*/result.json"))
    return [{**json.loads(path.read_text("utf-8")), "key": path.parent.parent.name} for path in paths]
