"""Steer calls that are not ours: mlx_lm's own generation on a model that is steered for a while."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from mlx_lqr.controller import Controller
from mlx_lqr.loading import adopt
from mlx_lqr.runtime.generate import Strength, feedback


def steer(model: Any, controller: Controller, strength: Strength = 1.0) -> AbstractContextManager[None]:
    """Inside `with steer(...)`, calls of the model are steered; afterwards the model is as it was, also after an error.

    Args:
        model: what `mlx_lm.load` or `mlx_lqr.load` returned.
        controller: a controller fitted on this model.
        strength: as in `generate`.

    `mlx_lm.generate`, `stream_generate` and `batch_generate` are steered at the prompt's last token and at every
    generated token. Of a direct call `model(tokens)` the last position is steered. A controller for the positions "all"
    steers every position of every call.

    Raises:
        InputError: a controller of another model, or something that is no model.
    """
    adopted = adopt(model)
    return adopted.steer(feedback(adopted, controller, strength), steer_all=controller.positions == "all")
