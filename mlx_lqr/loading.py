"""A model source -> a model. Sources resolve alike everywhere: in Python and in every command."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import re
import sys
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from mlx_lqr.backends.mlx.device import on_mac
from mlx_lqr.backends.protocol import Model, Progress
from mlx_lqr.errors import InputError

BackendName = Literal["auto", "mlx", "torch"]
_OLDEST = {"torch": (2, 13), "transformers": (5, 20)}
"""What the torch backend needs, as in pyproject.toml."""


def load(
    source: str | PathLike[str],
    *,
    backend: BackendName = "auto",
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Model:
    """Load a language model.

    Args:
        source: an MLX or Hugging Face folder (safetensors), a hub id such as `mlx-community/Qwen3-0.6B-4bit`, a .gguf
            file (converted once, kept in the cache folder), or "demo" for the demonstration model.
        backend: "mlx", "torch" (PyTorch and transformers: `pip install "mlx-lqr[torch]"`), or "auto": MLX on Metal,
            torch where it finds a CUDA GPU, else MLX on the CPU.
        device: "cpu", "cuda" or "cuda:NUMBER", for torch, which it chooses; by default a GPU where there is one.
        dtype: "float32", "float16" or "bfloat16"; by default the checkpoint's own on a GPU and float32 on the CPU.
        progress: called as progress(stage, done, total) while a source is fetched or converted.

    Raises:
        InputError: no such source, an unsupported architecture, damaged files, or a backend or device that is not here.
    """
    if backend not in get_args(BackendName):
        raise InputError(f"there is no backend {backend!r}: use {', '.join(get_args(BackendName))}")
    if backend == "mlx" and device is not None:
        raise InputError("MLX chooses its device itself: --device and device= are for the torch backend")
    chosen = backend if backend != "auto" else "torch" if device is not None else preferred_backend()
    if chosen == "torch":
        _check_torch()
    folder, name = resolve(source, progress=progress)
    if chosen == "torch":
        from mlx_lqr.backends.torch import model as torch

        return torch.load(folder, name, dtype, device)
    from mlx_lqr.backends.mlx import model as mlx

    return mlx.load(folder, name, dtype)


def preferred_backend() -> BackendName:
    """MLX on Metal, torch on CUDA, MLX on a bare CPU; torch is imported only where an NVIDIA driver is at work."""
    if on_mac() or importlib.util.find_spec("torch") is None:
        return "mlx"
    if importlib.util.find_spec("transformers") is not None and _nvidia_driver():
        import torch

        if torch.cuda.is_available():
            return "torch"
    return "mlx" if importlib.util.find_spec("mlx") is not None else "torch"


def _nvidia_driver() -> bool:
    """Whether a CUDA GPU can be there at all, without asking CUDA."""
    if sys.platform == "win32":
        return ctypes.util.find_library("nvcuda") is not None
    return any(Path(place).exists() for place in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


def _check_torch() -> None:
    for package, oldest in _OLDEST.items():
        if importlib.util.find_spec(package) is None:
            raise InputError(f'the torch backend needs {package}, which is not installed: pip install "mlx-lqr[torch]"')
        installed = metadata.version(package)
        numbers = tuple(int(digits) for digits in re.findall(r"\d+", installed)[:2])
        if numbers < oldest:
            raise InputError(
                f"the torch backend needs {package} {'.'.join(map(str, oldest))} or newer, not {installed}: "
                'pip install -U "mlx-lqr[torch]"'
            )


def adopt(model: Any) -> Model:
    """A `Model` around what the caller already has: one of ours as it is, a model of mlx-lm or transformers wrapped.

    Raises:
        InputError: neither of these, or an architecture that is not supported.
    """
    if hasattr(model, "steer") and hasattr(model, "fingerprint"):
        return model
    nn = sys.modules.get("mlx.nn")
    if nn is not None and isinstance(model, nn.Module):
        from mlx_lqr.backends.mlx.mlx_lm_models import model_classes
        from mlx_lqr.backends.mlx.model import MLXModel

        model_type = str(getattr(model, "model_type", type(model).__module__))
        model_classes(model_type)
        return MLXModel(model, model_type)
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        from mlx_lqr.backends.torch.model import TorchModel

        return TorchModel(model, str(model.config.model_type))
    raise InputError(
        f"cannot steer a {type(model).__name__}: give what mlx_lqr.load, mlx_lm.load or from_pretrained of a "
        "transformers model returned"
    )


def resolve(source: str | PathLike[str], *, progress: Progress | None = None) -> tuple[Path, str]:
    """The model folder behind a source, and the model's name; converts a GGUF file into the cache folder first."""
    from mlx_lqr.convert import sources

    text = os.fspath(source)
    if text == "demo":
        return sources.demo_model(progress=progress), sources.DEMO_NAME
    path = Path(text).expanduser()
    if path.is_dir():
        return path, path.resolve().name
    if path.is_file() and path.suffix == ".gguf":
        return sources.cached_conversion(path, progress=progress), path.stem
    if path.exists():
        raise InputError(
            f"{text} is no model: give a folder with config.json and safetensors, a .gguf file or a hub id"
        )
    from mlx_lqr.convert.hub import hub_folder

    return hub_folder(text), text.rsplit("/", 1)[-1]
