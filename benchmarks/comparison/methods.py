"""The rows of the tables, and for each the setting that is reported: fitted, calibrated, chosen among a few.

A method's file names its settings (`Method.compared`). Each is fitted on the same prompts and calibrated to the same
budgets of damage. Where there are several, the one with the most control at the normal budget is taken, on rows that no
report has; of equal ones the first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_lqr
from benchmarks.comparison.setting import Setting
from benchmarks.comparison.sources import Sets, Source
from mlx_lqr import tasks
from mlx_lqr.errors import InputError, OverflowingError
from mlx_lqr.lqr.concept_prompts import framed
from mlx_lqr.lqr.strength import Budget, Calibration
from mlx_lqr.methods.calibration import calibrate
from mlx_lqr.methods.method import Method
from mlx_lqr.methods.steering import Steering, load_steering
from mlx_lqr.tasks.records import digest

CHOSEN_AT: Budget = "normal"
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
class Chosen:
    """The setting of a method that is reported."""

    setting: str
    steering: Steering
    """With a calibration"""
    tried: Mapping[str, float]
    """The control of all settings on the rows to choose by; empty where there is one alone"""

    @property
    def calibration(self) -> Calibration:
        (calibration,) = self.steering.calibration
        assert calibration is not None
        return calibration


def choose(source: Source, setting: Setting, row: str) -> Chosen:
    """The setting of a row that is reported. What was fitted, calibrated or tried before is read from its files.

    Raises:
        InputError: no setting of the method can be fitted on these prompts, or the one chosen earlier is none any more.
    """
    method, folder = ROWS[row], setting.folder / "fits" / source.name
    sets = framed(setting.model, source.sets(setting))
    fitted: dict[str, Steering] = {}
    refused: list[InputError] = []
    settings = method.compared(setting.model.num_layers)[row]
    before = _chosen_before(source, setting, row)
    if before is not None:
        if before["setting"] not in settings:
            raise InputError(f"{row} has no setting {before['setting']!r} any more: measure it without --choices")
        settings = {before["setting"]: settings[before["setting"]]}
    for name, options in settings.items():
        setting.say(f"{source.name}: {row}, {name}")
        origins = [setting.model.fingerprint, method.name, name, dict(options), [list(one) for one in sets]]
        file = folder / f"{safe(row)}-{digest(origins)}.safetensors"
        try:
            steering = _fitted(source, setting, sets, method.name, options, file)
            if before is not None and not steering.calibration:
                known = Calibration(before["strength"], before["divergence"])
                steering = steering.calibrated(known, CHOSEN_AT)
            fitted[name] = _calibrated(setting, steering, file)
        except InputError as error:  # a method that cannot be fitted on these prompts says so, and the others go on
            refused.append(error)
    if not fitted:
        raise refused[0]
    if len(fitted) == 1:
        return Chosen(*next(iter(fitted.items())), before["tried"] if before is not None else {})
    tried = {name: _control(source, setting, row, name, steering) for name, steering in fitted.items()}
    best = max(tried, key=lambda name: tried[name])
    return Chosen(best, fitted[best], tried)


def _chosen_before(source: Source, setting: Setting, row: str) -> dict[str, Any] | None:
    """What earlier results tell of a method's choice for a source; None for ours, which is what has changed."""
    if setting.choices is None or row == OURS:
        return None
    for file in sorted(setting.choices.glob("*.json")):
        for told in json.loads(file.read_text("utf-8"))["methods"]:
            if told["method"] == row and source.name in told["sources"]:
                chosen: dict[str, Any] = told["sources"][source.name]
                return chosen
    return None


def _fitted(
    source: Source, setting: Setting, sets: Sets, method: str, options: Mapping[str, Any], file: Path
) -> Steering:
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


def _calibrated(setting: Setting, steering: Steering, file: Path) -> Steering:
    if not steering.calibration:
        steering = steering.calibrated(calibrate(setting.model, steering), CHOSEN_AT)
        steering.save(file)
    return steering


def _control(source: Source, setting: Setting, row: str, name: str, steering: Steering) -> float:
    """The control at the normal budget on the rows to choose by, and less than any where activations overflow."""
    task = source.task(setting, "tune")
    (strength,) = steering.strength_at(CHOSEN_AT)
    output = setting.folder / "fits" / source.name / f"{safe(row)}-{safe(name)}.jsonl"
    named = tasks.NamedSteering(row, steering)
    try:
        run = tasks.evaluate(setting.model, task, named, [strength], output=output, loading=setting.loading)
    except OverflowingError:
        return float("-inf")
    return run.results()[0].metrics[task.control].value


def safe(name: str) -> str:
    """A name for a file."""
    return "".join(letter if letter.isalnum() else "-" for letter in name).strip("-")
