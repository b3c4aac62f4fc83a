"""PyTorch as a backend: CUDA where there is a GPU, else the CPU."""

from __future__ import annotations

import ctypes.util
import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_lqr.backends.backend import Backend, Suitability
from mlx_lqr.backends.capabilities import DIFFERENTIABLE, HEAD_RECORDER, RECORDER
from mlx_lqr.backends.checkpoint.adapter import Adapter
from mlx_lqr.backends.protocol import Model
from mlx_lqr.errors import InputError

OLDEST = {"torch": (2, 13), "transformers": (5, 20)}
"""What it needs, as in pyproject.toml."""


class Torch(Backend):
    """transformers' models."""

    name = "torch"
    title = "PyTorch"
    capabilities = frozenset({RECORDER, HEAD_RECORDER, DIFFERENTIABLE})
    takes_device = True
    spreads = False
    adopts = "from_pretrained of a transformers model"

    def suitability(self) -> Suitability:
        """torch is imported only where an NVIDIA driver is at work."""
        if importlib.util.find_spec("torch") is None:
            return Suitability.NOT_INSTALLED
        if importlib.util.find_spec("transformers") is not None and nvidia_driver():
            import torch

            if torch.cuda.is_available():
                return Suitability.GPU
        return Suitability.CPU

    def check_installed(self) -> None:
        for package, oldest in OLDEST.items():
            if importlib.util.find_spec(package) is None:
                raise InputError(
                    f'the torch backend needs {package}, which is not installed: pip install "mlx-lqr[torch]"'
                )
            installed = metadata.version(package)
            numbers = tuple(int(digits) for digits in re.findall(r"\d+", installed)[:2])
            if numbers < oldest:
                raise InputError(
                    f"the torch backend needs {package} {'.'.join(map(str, oldest))} or newer, not {installed}: "
                    'pip install -U "mlx-lqr[torch]"'
                )

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
        from mlx_lqr.backends.torch import model
        from mlx_lqr.backends.torch.framework import TorchFramework

        with TorchFramework.turn:  # building a model sets torch's default dtype
            return model.load(folder, name, dtype, device, adapter)

    def adopt(self, model: Any) -> Model | None:
        transformers = sys.modules.get("transformers")
        if transformers is None or not isinstance(model, transformers.PreTrainedModel):
            return None
        from mlx_lqr.backends.torch import model as models
        from mlx_lqr.backends.torch.framework import TorchFramework

        with TorchFramework.turn:
            return models.adopt(model)


def nvidia_driver() -> bool:
    """Whether a CUDA GPU can be there at all, without asking CUDA."""
    if sys.platform == "win32":
        return ctypes.util.find_library("nvcuda") is not None
    return any(Path(place).exists() for place in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


BACKEND = Torch()
