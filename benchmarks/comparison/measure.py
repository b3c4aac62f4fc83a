"""One experiment on one model: every method at every budget, and what was found as a small JSON file.

Rows stay in the output folder, a file for each source and method. What is there is not measured again, so that an
interrupted run goes on, and a method that reaches no further than one budget is not measured twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.comparison.experiments import Experiment
from benchmarks.comparison.methods import METHODS, OURS, REMOVES, Chosen, choose, safe
from benchmarks.comparison.setting import Setting
from benchmarks.comparison.sources import Source
from benchmarks.comparison.statistics import Key, by_prompt, leads, of_prompts, pooled
from mlx_lqr import tasks
from mlx_lqr.analysis import write_json
from mlx_lqr.errors import InputError, OverflowingError
from mlx_lqr.lqr.strength import Budget
from mlx_lqr.tasks.bootstrap import Estimate, Metric, estimate
from mlx_lqr.tasks.records import digest

DAMAGE = ("perplexity", "distinct_2", "repetition", "kl", "capability")
"""What is kept of every experiment that measures it, besides control and the experiment's own columns"""
RESULT = "result.json"
SUMS = "control by prompt"
"""Of a method at a budget, so that another can be paired with it later (`statistics.by_prompt`)"""
ASKED = "asked"
"""A digest of the prompts and of how they are answered, so that prompt i is only paired with itself"""
Metrics = dict[str, Metric]


def measure(experiment: Experiment, setting: Setting, methods: Sequence[str] = METHODS) -> Path:
    """Run one experiment; return the JSON file of what was found.

    Args:
        setting: its model is the one that is steered.
        methods: those of `METHODS` to take; a method that only removes is left out where nothing is to be removed.
    """
    run = _Run(experiment, setting, setting.folder / experiment.name)
    setting.say(f"{experiment.name}: unsteered")
    unsteered = _estimates(run.metrics("unsteered"))
    wanted = [row for row in methods if experiment.removes or row not in REMOVES]
    if experiment.ceiling is not None and unsteered[run.control].value >= experiment.ceiling:
        wanted = []
    told = {row: one for row, one in _kept(run).items() if row in wanted}
    measured = {}
    for row in wanted:
        if row not in told:
            told[row], measured[row] = run.method(row)
    compared = _leads(run.control, measured, told)
    for (row, budget), lead in compared.items():
        told[row]["budgets"][budget]["lead"] = _interval(lead)
    sets = [source.sets(setting) for source in experiment.sources]
    result = {
        "experiment": experiment.name,
        "model": setting.model.name,
        "judge": setting.judge.name,
        "version": metadata.version("mlx-lqr"),
        "backend": setting.model.backend,
        "dtype": setting.dtype,
        "sizes": asdict(setting.sizes),
        "budgets": dict(setting.budgets),
        "prompts": [max(len(of_source[side]) for of_source in sets) for side in (0, 1)],
        "rows": run.rows,
        ASKED: run.asked,
        "control": run.control,
        "control_label": run.control_label,
        "comparisons": len(compared),
        "unsteered": {name: _interval(one) for name, one in unsteered.items()},
        "methods": [told[row] for row in wanted],
    }
    path = run.folder / RESULT
    write_json(path, result)
    return path


def _kept(run: _Run) -> dict[str, dict[str, Any]]:
    """What an earlier result tells of the methods other than ours.

    Raises:
        InputError: there is none, or it is of other rows, prompts, sampling or budgets.
    """
    setting = run.setting
    if setting.kept is None:
        return {}
    file = setting.kept / f"{run.experiment.name}.json"
    if not file.is_file():
        raise InputError(f"{file} does not exist: measure this experiment's other methods first, without --kept")
    before = json.loads(file.read_text("utf-8"))
    if before["rows"] != run.rows or before["sizes"] != asdict(setting.sizes):
        raise InputError(f"{file} is of other rows: measure this experiment without --kept")
    if before.get(ASKED) != run.asked:
        raise InputError(f"{file} is of other prompts or sampling: measure this experiment without --kept")
    if before["budgets"] != dict(setting.budgets):
        raise InputError(f"{file} is of other budgets: measure this experiment without --kept, or see --normal-only")
    return {one["method"]: {**one, "kept": True} for one in before["methods"] if one["method"] != OURS}


def _leads(
    control: str, measured: Mapping[str, Mapping[Budget, Metrics]], told: Mapping[str, Mapping[str, Any]]
) -> dict[Key, Estimate]:
    """What A-LQR leads each other method by, measured now or kept, at each budget that both were measured at."""
    ours = {at: metrics[control] for at, metrics in measured.get(OURS, {}).items()}
    theirs = {
        (row, at): metrics[control] for row, each in measured.items() if row != OURS for at, metrics in each.items()
    }
    kept = {
        (row, at): of_prompts(found[SUMS], ours[at])
        for row, one in told.items()
        if one.get("kept")
        for at, found in one["budgets"].items()
        if at in ours and SUMS in found
    }
    return leads(ours, theirs | kept)


class _Run:
    """An experiment's tasks on one model."""

    def __init__(self, experiment: Experiment, setting: Setting, folder: Path) -> None:
        self.experiment, self.setting, self.folder = experiment, setting, folder
        self.tasks = {source: experiment.task(source, setting) for source in experiment.sources}
        first = self.tasks[experiment.sources[0]]
        self.control, self.control_label = first.control, first.control_label

    @property
    def rows(self) -> dict[str, int]:
        """How many rows there are of each part, of all sources together."""
        rows: dict[str, int] = {}
        for task in self.tasks.values():
            for part in task.parts:
                rows[part.name] = rows.get(part.name, 0) + len(part)
        return rows

    @property
    def asked(self) -> str:
        """The digest of all that decides on the rows but the steering: prompts, sampling, judge."""
        model = self.setting.model
        each = self.tasks.items()
        return digest({source.name: {part.name: part.settings(model) for part in task.parts} for source, task in each})

    def method(self, row: str) -> tuple[dict[str, Any], dict[Budget, Metrics]]:
        """What is told of a method, and its metrics at each budget."""
        told: dict[str, Any] = {"method": row, "sources": {}, "budgets": {}}
        try:
            fits = {source: choose(source, self.setting, row) for source in self.tasks}
        except InputError as error:
            return {**told, "failed": str(error)}, {}
        told["sources"] = {source.name: _told(fit) for source, fit in fits.items()}
        measured: dict[Budget, Metrics] = {}
        for budget in self.setting.budgets:
            self.setting.say(f"{self.experiment.name}: {row}, {budget}")
            try:
                measured[budget] = self.metrics(row, fits, budget)
            except OverflowingError as error:
                told["budgets"][budget] = {"failed": str(error)}
            else:
                estimates = _estimates(measured[budget])
                told["budgets"][budget] = {
                    "metrics": {name: _interval(one) for name, one in estimates.items()},
                    SUMS: by_prompt(measured[budget][self.control]),
                }
        return told, measured

    def metrics(self, row: str, fits: Mapping[Source, Chosen] | None = None, budget: Budget = "normal") -> Metrics:
        """The metrics of all sources together, at a budget, or unsteered where nothing was fitted."""
        each: list[Metrics] = []
        for source, task in self.tasks.items():
            fit = fits[source] if fits is not None else None
            run = tasks.evaluate(
                self.setting.model,
                task,
                tasks.NamedSteering(row, fit.steering) if fit else None,
                list(fit.steering.strength_at(budget)) if fit else [0.0],
                output=self.folder / "rows" / source.name / f"{safe(row)}.jsonl",
                loading=self.setting.loading,
            )
            (parts,) = run.rows.values()
            each.append({name: one for part in task.parts for name, one in part.metrics(parts[part.name]).items()})
        kept = [name for name in each[0] if name in (self.control, *self.experiment.columns, *DAMAGE)]
        return {name: pooled([metrics[name] for metrics in each]) for name in kept}


def _told(fit: Chosen) -> dict[str, Any]:
    return {
        "setting": fit.setting,
        "strength": dict(fit.calibration.strength),
        "divergence": dict(fit.calibration.divergence),
        "tried": dict(fit.tried),
    }


def _estimates(metrics: Metrics) -> dict[str, Estimate]:
    return {name: estimate(metric) for name, metric in metrics.items()}


def _interval(one: Estimate) -> list[float]:
    return [float(f"{number:.4g}") for number in (one.value, one.low, one.high)]


def collect(output: Path, results: Path) -> None:
    """Copy every result of an output folder to `results`, a file for each model and experiment.

    Raises:
        InputError: there are none.
    """
    paths = sorted(output.glob(f"*/*/{RESULT}"))
    if not paths:
        raise InputError(f"there are no results in {output}: measure first (python -m benchmarks.comparison run)")
    for path in paths:
        key, name = path.parts[-3:-1]
        write_json(results / key / f"{name}.json", json.loads(path.read_text("utf-8")))


def load_results(results: Path) -> list[dict[str, Any]]:
    """What was collected, in a fixed order, with the steered model's `key`, its folder's name."""
    paths = sorted(results.glob("*/*.json"))
    return [{**json.loads(path.read_text("utf-8")), "key": path.parent.name} for path in paths]
