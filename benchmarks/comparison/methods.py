"""The rows of the tables, and for each the setting that is reported: fitted, calibrated, chosen among a few.

A method's file names its settings (`Method.compared`). Each is fitted on the same prompts and calibrated to the same
budgets of damage. Where there are several, the one with the most control at the normal budget is taken, on rows that no
report has; of equal ones the first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_lqr
from benchmarks.comparison.setting import Setting
from benchmarks.comparison.sources import Source
from mlx_lqr import tasks
from mlx_lqr.analysis import write_json
from mlx_lqr.errors import InputError, OverflowingError
from mlx_lqr.lqr.prompts import Prompt
from mlx_lqr.methods.calibration import calibrate
from mlx_lqr.methods.method import Method
from mlx_lqr.methods.steering import Steering, load_steering
from mlx_lqr.tasks.records import digest

BUDGETS: Mapping[str, float] = {"gentle": 0.1, "normal": 0.2, "strong": 0.4}
"""Nats of KL a token that every method may move the model's predictions by"""
CHOSEN_AT = "normal"
LAYERS = 12
"""Of a model to list the rows for, whose names do not depend on it."""
ROWS: Mapping[str, Method[Any]] = {
    row: method for method in mlx_lqr.METHODS.values() for row in method.compared(LAYERS)
}
"""The rows of the tables: every method under its name, and A-LQR also in other settings."""
METHODS = tuple(ROWS)
OURS = "alqr"
"""The row that all others are compared with."""
OWN = tuple(row for row, method in ROWS.items() if method.name == OURS)
"""A-LQR in all its settings."""
REMOVES = tuple(row for row, method in ROWS.items() if method.removes_only)
"""Methods that can only take a concept away."""
JACOBIAN_PROMPTS = 8
"""As many as `fit` takes"""


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A fitted setting of a method with its strength for each budget."""

    setting: str
    steering: Steering
    strength: Mapping[str, float]
    divergence: Mapping[str, float]
    """KL reached at each, nats a token: less than the budget where even the strongest sensible strength is below it"""
    tried: Mapping[str, float]
    """The control of all settings on the rows to choose by; empty where there is one alone"""


def calibrated(source: Source, setting: Setting, row: str) -> Calibrated:
    """The setting of a row that is reported. What was fitted, calibrated or tried before is read from its files.

    Raises:
        InputError: no setting of the method can be fitted on these prompts.
    """
    method, folder = ROWS[row], setting.folder / "fits" / source.name
    settings = method.compared(setting.model.num_layers)[row]
    sets = source.sets(setting)
    fitted: list[Calibrated] = []
    refused: list[InputError] = []
    for name, options in settings.items():
        setting.say(f"{source.name}: {row}, {name}")
        origins = [setting.model.fingerprint, method.name, name, dict(options), [list(one) for one in sets]]
        stem = folder / f"{safe(row)}-{digest(origins)}"
        try:
            steering = _fitted(source, setting, sets, method.name, options, stem)
            strength, divergence = _calibration(setting, steering, stem)
        except InputError as error:  # a method that these prompts are too few for says so, and the others go on
            refused.append(error)
        else:
            fitted.append(Calibrated(name, steering, strength, divergence, {}))
    if not fitted:
        raise refused[0]
    return fitted[0] if len(fitted) == 1 else _best(source, setting, row, fitted)


def _best(source: Source, setting: Setting, row: str, fitted: Sequence[Calibrated]) -> Calibrated:
    task = source.task(setting, "tune")
    (part,) = (part for part in task.parts if task.control in part.metrics([]))
    task = tasks.Task(task.name, (part,), task.control, task.control_label)
    tried = {}
    for one in fitted:
        strength = one.strength[CHOSEN_AT]
        steering = tasks.NamedSteering(row, one.steering)
        output = setting.folder / "fits" / source.name / f"{safe(row)}-{safe(one.setting)}.jsonl"
        try:
            run = tasks.evaluate(setting.model, task, steering, [strength], output=output, loading=setting.loading)
            tried[one.setting] = run.results()[0].metrics[task.control].value
        except OverflowingError:
            tried[one.setting] = float("-inf")
    best = max(fitted, key=lambda one: tried[one.setting])
    return Calibrated(best.setting, best.steering, best.strength, best.divergence, tried)


def _fitted(
    source: Source,
    setting: Setting,
    sets: tuple[Sequence[Prompt], Sequence[Prompt]],
    method: str,
    options: Mapping[str, Any],
    stem: Path,
) -> Steering:
    file = stem.with_name(f"{stem.name}.safetensors")
    if file.is_file():
        return load_steering(file)
    chosen = dict(options)
    method = chosen.pop("method", method)
    if any(option.name == "jacobians" for option in mlx_lqr.METHODS[method].options):
        nominal = sets[0][:JACOBIAN_PROMPTS]
        store = file.with_name(f"jacobians-{digest(list(nominal))}.safetensors")
        store.parent.mkdir(parents=True, exist_ok=True)
        chosen["jacobians"] = mlx_lqr.linearize(setting.model, nominal, store=store)  # the settings share them
    steering = mlx_lqr.fit_baseline(setting.model, method, *sets, concept=source.name, **chosen)
    steering.save(file)
    return steering


def _calibration(setting: Setting, steering: Steering, stem: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Strength and divergence for each budget."""
    file = stem.with_name(f"{stem.name}-{digest(dict(BUDGETS))}.json")
    if not file.is_file():
        calibration = calibrate(setting.model, steering, budgets=BUDGETS)
        strength, divergence = (
            {name: float(of[name]) for name in BUDGETS} for of in (calibration.strength, calibration.divergence)
        )
        write_json(file, {"strength": strength, "divergence": divergence})
    known = json.loads(file.read_text("utf-8"))  # as a run that goes on reads it, so that both have the same digits
    return known["strength"], known["divergence"]


def safe(name: str) -> str:
    """A name for a file."""
    return "".join(letter if letter.isalnum() else "-" for letter in name).strip("-")
