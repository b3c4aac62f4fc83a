"""Controllers of bundled concepts in the cache folder: used again as long as `fit` would make the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.controllers import controller_for
from helpers.tiny import tiny

import mlx_lqr
from mlx_lqr.commands import kept_controllers
from mlx_lqr.lqr.strength import BUDGETS, Calibration


def test_kept_controllers_are_of_todays_recipe_and_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLX_LQR_CACHE", str(tmp_path))
    made = []
    model: Any = tiny("llama")
    calibration = Calibration(dict.fromkeys(BUDGETS, 1.0), dict.fromkeys(BUDGETS, 0.1))
    monkeypatch.setattr(kept_controllers, "calibrate", lambda *_, **__: calibration)

    def fitted(model: Any, *sets: Any, feedback: float = 0.5, **options: Any) -> mlx_lqr.Controller:
        made.append(feedback)
        return controller_for(model)

    def fitted_otherwise(model: Any, *sets: Any, feedback: float = 1.0, **options: Any) -> mlx_lqr.Controller:
        return fitted(model, *sets, feedback=feedback)

    few = tuple(texts[:2] for texts in mlx_lqr.bundled_prompts("dog"))
    monkeypatch.setattr(kept_controllers, "framed", lambda model, texts: texts)
    for texts, fit in ((few, fitted), (few, fitted), (few, fitted_otherwise), (few[::-1], fitted), (few, fitted)):
        monkeypatch.setattr(kept_controllers, "bundled_prompts", lambda concept, texts=texts: texts)
        monkeypatch.setattr(kept_controllers, "fit", fit)
        kept_controllers.kept_controller(model, "dog", lambda *_: None)
    assert made == [0.5, 1.0, 0.5]  # the second and the last were there
