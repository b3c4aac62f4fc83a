"""MLX as a backend: Metal on a Mac, else the CPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from mlx_lqr import launched
from mlx_lqr.backends.backend import Backend, Suitability
from mlx_lqr.backends.capabilities import DIFFERENTIABLE, HEAD_RECORDER, RECORDER
from mlx_lqr.backends.checkpoint.adapter import Adapter
from mlx_lqr.backends.mlx.device import on_mac
from mlx_lqr.backends.protocol import ADAPTED, Model
from mlx_lqr.errors import InputError


class MLX(Backend):
    """mlx-lm's models."""

    name = "mlx"
    title = "MLX"
    capabilities = frozenset({RECORDER, HEAD_RECORDER, DIFFERENTIABLE})
    takes_device = False
    spreads = True
    adopts = "mlx_lm.load"

    def suitability(self) -> Suitability:
        if on_mac():
            return Suitability.MADE_FOR_IT
        return Suitability.CPU if importlib.util.find_spec("mlx") is not None else Suitability.NOT_INSTALLED

    def check_installed(self) -> None:
        if importlib.util.find_spec("mlx") is None:
            raise InputError("the mlx backend needs mlx, which is not installed: pip install mlx-lqr")

    def load(
        self,
        folder: Path,
        name: str,
        *,
        dtype: str | None,
        device: str | None,
        adapter: Adapter | None,
        pipeline: bool,
    ) -> Model:
        from mlx_lqr.backends.mlx import model
        from mlx_lqr.backends.mlx.framework import MLXFramework

        assert device is None
        with MLXFramework.turn:
            return model.load(folder, name, dtype, adapter, pipeline)

    def said(self, text: str | None) -> str | None:
        if launched.count() == 1:
            return text
        from mlx_lqr.backends.mlx.distributed import joined

        return joined(pipeline=False).said(text)

    def adopt(self, model: Any) -> Model | None:
        nn = sys.modules.get("mlx.nn")
        if nn is None or not isinstance(model, nn.Module):
            return None
        from mlx_lqr.backends.mlx.adapter import adapter_in
        from mlx_lqr.backends.mlx.framework import MLXFramework
        from mlx_lqr.backends.mlx.library import is_measured, model_classes, settings_of
        from mlx_lqr.backends.mlx.model import MLXModel

        model_type = str(getattr(model, "model_type", type(model).__module__))
        adapter = adapter_in(model)
        name = model_type if adapter is None else f"{model_type}{ADAPTED}{adapter.name}"
        if is_measured(model_type):
            from mlx_lqr.backends.mlx.measured_model import MeasuredModel

            settings = {"model_type": model_type, **settings_of(model)}
            with MLXFramework.turn:
                return MeasuredModel(model, settings, name, adapter=adapter)
        model_classes(model_type)
        adopted = MLXModel(model, name)
        adopted.adapter = adapter
        return adopted


BACKEND = MLX()
