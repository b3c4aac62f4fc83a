"""Controllers of bundled concepts, fitted once for a model and kept in the cache folder, for `demo`, `serve`
and /fit. What `fit` would make otherwise today is fitted again."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from mlx_lqr.backends.protocol import Progress, Recorder
from mlx_lqr.concepts import bundled_prompts
from mlx_lqr.errors import InputError
from mlx_lqr.files.cache import cache_folder
from mlx_lqr.files.locks import locked
from mlx_lqr.loading import able_to_fit
from mlx_lqr.lqr.concept_prompts import framed
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.fit import fit
from mlx_lqr.lqr.layers import EFFECTIVE
from mlx_lqr.lqr.strength import BUDGETS
from mlx_lqr.methods.calibration import calibrate
from mlx_lqr.tasks.records import digest


def kept_controller(model: Recorder, concept: str, progress: Progress) -> tuple[Path, Controller]:
    """A bundled concept's calibrated controller and its file, fitted if it is not there; by another backend, where the
    model's cannot.

    Raises:
        InputError: there is no such concept, or the file cannot be written.
    """
    texts = bundled_prompts(concept)
    file = controllers_folder() / f"{concept}-{model.fingerprint}-{_recipe(texts)}.safetensors"
    if (kept := _whole(file, model)) is not None:
        return file, kept
    with locked(file, patience=math.inf):  # whoever else makes it
        if (kept := _whole(file, model)) is not None:
            return file, kept
        able = able_to_fit(model, progress=progress)
        controller = fit(able, *framed(model, texts), concept=concept, progress=progress)
        controller = controller.calibrated(calibrate(model, controller, progress=progress))
        controller.save(file, force=True)  # even over a damaged one
        return file, controller


def _recipe(texts: Sequence[Sequence[str]]) -> str:
    """What a file's name says of how it was made: by which defaults of `fit`, for which budgets, from which prompts."""
    defaults = {name: repr(option.default) for name, option in inspect.signature(fit).parameters.items()}
    return digest([metadata.version("mlx-lqr"), defaults, EFFECTIVE, BUDGETS, [list(prompts) for prompts in texts]])[:8]


def controllers_folder() -> Path:
    """Where controllers are kept that are given no file."""
    return cache_folder() / "controllers"


def _whole(file: Path, model: Recorder) -> Controller | None:
    """The controller in a file, if it is whole, calibrated and the model's."""
    try:
        controller = Controller.load(file)
        controller.check_model(model)
    except InputError:
        return None
    return controller if any(controller.calibration) else None
