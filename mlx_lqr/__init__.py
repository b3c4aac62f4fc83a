"""Closed-loop activation steering (activation LQR, arXiv 2604.19018) for language models on your own machine.

    model = mlx_lqr.load("demo")
    controller = mlx_lqr.fit(model, positive_prompts, negative_prompts)
    print(mlx_lqr.generate(model, "Once upon a time,", controller=controller, strength=2.0))

The README has more examples, docstrings say what every function takes and raises.
"""

# ruff: isort: off
from mlx_lqr import starting as _starting  # noqa: F401 - first: it says from where everything else is imported
# ruff: isort: on

from importlib import metadata

from mlx_lqr.backends import blas

blas.preload()  # before anything imports mlx.core

from mlx_lqr.concepts import bundled_concepts, bundled_prompts  # noqa: E402
from mlx_lqr.errors import InputError  # noqa: E402
from mlx_lqr.files.prompts import read_prompts  # noqa: E402
from mlx_lqr.loading import load, load_steering  # noqa: E402
from mlx_lqr.lqr.adapt import adapt  # noqa: E402
from mlx_lqr.lqr.concept_prompts import chat_prompts, concept_prompts, style_prompts  # noqa: E402
from mlx_lqr.lqr.contrast import Contrast, contrast  # noqa: E402
from mlx_lqr.lqr.controller import Controller, compile  # noqa: E402
from mlx_lqr.lqr.fit import fit  # noqa: E402
from mlx_lqr.lqr.layers import choose_layers  # noqa: E402
from mlx_lqr.lqr.linearize import Jacobians, linearize  # noqa: E402
from mlx_lqr.lqr.riccati import Gains, solve  # noqa: E402
from mlx_lqr.lqr.sets import review_prompts, review_separation  # noqa: E402
from mlx_lqr.lqr.strength import BUDGETS, Calibration  # noqa: E402
from mlx_lqr.methods.baseline import Baseline  # noqa: E402
from mlx_lqr.methods.calibration import calibrate  # noqa: E402
from mlx_lqr.methods.fitting import fit_baseline  # noqa: E402
from mlx_lqr.methods.recording import Recording  # noqa: E402
from mlx_lqr.methods.registry import METHODS  # noqa: E402
from mlx_lqr.runtime import Options, Piece, batch_generate, batch_stream, generate, steer, stream  # noqa: E402

__version__ = metadata.version("mlx-lqr")

__all__ = [
    "BUDGETS",
    "METHODS",
    "Baseline",
    "Calibration",
    "Contrast",
    "Controller",
    "Gains",
    "InputError",
    "Jacobians",
    "Options",
    "Piece",
    "Recording",
    "adapt",
    "batch_generate",
    "batch_stream",
    "bundled_concepts",
    "bundled_prompts",
    "calibrate",
    "chat_prompts",
    "choose_layers",
    "compile",
    "concept_prompts",
    "contrast",
    "fit",
    "fit_baseline",
    "generate",
    "linearize",
    "load",
    "load_steering",
    "read_prompts",
    "review_prompts",
    "review_separation",
    "solve",
    "steer",
    "stream",
    "style_prompts",
]
