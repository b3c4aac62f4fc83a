"""One experiment on one model: fit, tune and report every method, and keep what was found as JSON.

Whatever is done already is read from the output folder, so that an interrupted run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.comparison.experiments import Experiment, Setting
from benchmarks.comparison.methods import METHODS, REMOVES, WITHOUT_CURVE, Fitter, space
from mlx_lqr import tasks
from mlx_lqr.analysis import write_json
from mlx_lqr.backends.protocol import Progress
from mlx_lqr.tasks.bootstrap import Estimate
from mlx_lqr.tasks.tuning import Trial, Tuned, tune

LIMIT = 1.3
CURVE = (0.6, 1.5)
"""Besides the recommended strength, multiples of it"""
RIVALS = 1
"""That get a curve beside A-LQR's: those with the most control while tuning"""


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
    fitter = Fitter(setting.model, positive, negative, experiment.name, folder)
    tuning, report = experiment.task(setting, "tune"), experiment.task(setting, "report")
    tuned: dict[str, Tuned] = {}
    for method in methods:
        if method in REMOVES and not experiment.removes:
            continue
        if progress:
            progress(f"{experiment.name}: {method}", 0, 0)
        tuned[method] = tune(
            setting.model,
            tuning,
            space(fitter, method),
            limit=LIMIT,
            evaluations=setting.sizes.evaluations,
            folder=folder / "tune",
            **options,
        )
    unsteered = tasks.evaluate(setting.model, report, output=folder / "report" / "unsteered.jsonl", **options)
    runs: dict[str, tasks.Evaluation] = {}
    for method, search in tuned.items():
        if search.best is None or search.steering is None:
            continue
        if progress:
            progress(f"{experiment.name}: report of {method}", 0, 0)
        strengths = [search.best.strength]
        if experiment.curve and method in _with_curve(tuned):
            strengths += [float(f"{factor * search.best.strength:.3g}") for factor in CURVE]
        steering = tasks.NamedSteering(method, search.steering)
        output = folder / "report" / f"{_safe(method)}.jsonl"
        runs[method] = tasks.evaluate(setting.model, report, steering, strengths, output=output, **options)
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
        "methods": [_method(method, search, runs, unsteered) for method, search in tuned.items()],
    }
    path = folder / "result.json"
    write_json(path, result)
    return path


def _with_curve(tuned: Mapping[str, Tuned]) -> set[str]:
    """A-LQR, and the rivals with the most control while tuning."""
    control = {
        method: search.best.control.value
        for method, search in tuned.items()
        if search.best is not None and method != "alqr" and method not in WITHOUT_CURVE
    }
    return {"alqr", *sorted(control, key=lambda method: -control[method])[:RIVALS]}


def _method(
    method: str, search: Tuned, runs: Mapping[str, tasks.Evaluation], unsteered: tasks.Evaluation
) -> dict[str, Any]:
    """All there is to say about a method: its trials, what was recommended, and its results beside the others'."""
    told: dict[str, Any] = {"method": method, "trials": [_trial(trial) for trial in search.trials], "best": None}
    if search.best is None:
        return told
    strength = search.best.strength
    results = runs[method].results(unsteered)
    recommended = next(result for result in results if result.strength == strength)
    told |= {
        "best": _trial(search.best),
        "metrics": _plain(recommended.metrics),
        "change": _plain(recommended.change),
        "curve": [{"strength": result.strength, "metrics": _plain(result.metrics)} for result in results],
    }
    if "alqr" in runs and method != "alqr":
        own = replace(runs[method], rows={strength: runs[method].rows[strength]})
        alqr = replace(runs["alqr"], rows={0.0: next(iter(runs["alqr"].rows.values()))})
        told["against_alqr"] = _plain(own.results(alqr)[0].change)
    return told


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "setting": trial.candidate,
        "strength": trial.strength,
        "control": _interval(trial.control),
        "damage": _interval(trial.damage),
        "ratio": trial.relative,
        "within": trial.within,
    }


def _decoding(task: tasks.Task) -> dict[str, Any]:
    """How the task's texts are drawn."""
    part: Any = next(part for part in task.parts if hasattr(part, "decoding"))
    return asdict(part.decoding)


def _plain(metrics: Mapping[str, Estimate]) -> dict[str, list[float]]:
    return {name: _interval(estimate) for name, estimate in metrics.items()}


def _interval(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


def _safe(method: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in method).strip("-")


def load_results(folder: Path) -> list[dict[str, Any]]:
    """Every result under an output folder, in a fixed order, with the steered model's `key`, its folder's name."""
    paths = sorted(folder.glob("*/*/result.json"))
    return [{**json.loads(path.read_text("utf-8")), "key": path.parent.parent.name} for path in paths]
