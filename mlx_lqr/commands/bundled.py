"""The controllers of the bundled concepts, fitted once for each model and kept in the cache folder."""

from __future__ import annotations

import math
from pathlib import Path

from mlx_lqr.backends.protocol import Model
from mlx_lqr.commands.progress import progress_bars
from mlx_lqr.concepts import bundled_prompts
from mlx_lqr.errors import InputError
from mlx_lqr.files.cache import cache_folder
from mlx_lqr.files.locks import locked
from mlx_lqr.lqr.concept_prompts import framed
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.fit import fit
from mlx_lqr.methods.calibration import calibrate


def bundled_controller(model: Model, concept: str) -> Controller:
    """The controller of a bundled concept, calibrated.

    Raises:
        InputError: there is no such concept, or it cannot be fitted.
    """
    file = bundled_file(model, concept)
    if (kept := _kept(file, model)) is not None:
        return kept
    with progress_bars() as progress, locked(file, patience=math.inf):  # whoever else makes it
        if (kept := _kept(file, model)) is not None:
            return kept
        prompts = framed(model, bundled_prompts(concept))
        controller = fit(model, *prompts, concept=concept, progress=progress)
        controller = controller.calibrated(calibrate(model, controller, progress=progress))
        controller.save(file, force=True)  # even over a damaged one
        return controller


def bundled_file(model: Model, concept: str) -> Path:
    """Where it is kept."""
    return cache_folder() / "demo" / f"{concept}-{model.fingerprint}.safetensors"


def _kept(file: Path, model: Model) -> Controller | None:
    """The controller in a file, if it is whole, calibrated and the model's."""
    try:
        controller = Controller.load(file)
        controller.check_model(model)
    except InputError:
        return None
    return controller if any(controller.calibration) else None
