"""A model source -> a model. Sources resolve alike everywhere: in Python and in every command."""

from __future__ import annotations

import os
import sys
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from mlx_lqr.backends.base import Model, Progress
from mlx_lqr.errors import InputError

BackendName = Literal["auto", "mlx"]


def load(
    source: str | PathLike[str],
    *,
    backend: BackendName = "auto",
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Model:
    """Load a language model.

    Args:
        source: an MLX or Hugging Face folder (safetensors), a hub id such as `mlx-community/Qwen3-0.6B-4bit`, a .gguf
            file (converted once, kept in the cache folder), or "demo" for the demonstration model.
        backend: "mlx", or "auto" to choose.
        dtype: "float32", "float16" or "bfloat16"; by default the checkpoint's own on a GPU and float32 on the CPU.
        progress: called as progress(stage, done, total) while a source is fetched or converted.

    Raises:
        InputError: no such source, an unsupported architecture, or damaged files.
    """
    if backend not in ("auto", "mlx"):
        raise InputError(f"there is no backend {backend!r}: use auto or mlx")
    folder, name = resolve(source, progress=progress)
    from mlx_lqr.backends import mlx

    return mlx.load(folder, name, dtype)


def adopt(model: Any) -> Model:
    """A `Model` around what the caller already has: one of ours as it is, an mlx-lm module wrapped.

    Raises:
        InputError: neither of these, or an architecture that is not supported.
    """
    if hasattr(model, "steer") and hasattr(model, "fingerprint"):
        return model
    nn = sys.modules.get("mlx.nn")
    if nn is not None and isinstance(model, nn.Module):
        from mlx_lqr.backends.mlx import MLXModel
        from mlx_lqr.backends.mlx_lm_models import model_classes

        model_type = str(getattr(model, "model_type", type(model).__module__))
        model_classes(model_type)
        return MLXModel(model, model_type)
    raise InputError(f"cannot steer a {type(model).__name__}: give what mlx_lqr.load or mlx_lm.load returned")


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
    from mlx_lqr.convert.huggingface import hub_folder

    return hub_folder(text), text.rsplit("/", 1)[-1]
