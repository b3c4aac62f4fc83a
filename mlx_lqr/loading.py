"""A model source -> a model. Sources resolve alike everywhere: in Python and in every command."""

from __future__ import annotations

import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast

from mlx_lqr import launched
from mlx_lqr.backends import registry
from mlx_lqr.backends.backend import Backend, Suitability
from mlx_lqr.backends.capabilities import DIFFERENTIABLE, RUNNER, require
from mlx_lqr.backends.checkpoint.adapter import Adapter
from mlx_lqr.backends.checkpoint.adapter_folder import read_adapter
from mlx_lqr.backends.protocol import ADAPTED, Differentiable, Model, Progress, Runner
from mlx_lqr.errors import InputError
from mlx_lqr.methods import steering

BackendName = Literal["auto", registry.Name]


def load(
    source: str | PathLike[str],
    *,
    backend: BackendName = "auto",
    device: str | None = None,
    dtype: str | None = None,
    adapter: str | PathLike[str] | None = None,
    pipeline: bool = False,
    progress: Progress | None = None,
) -> Model:
    """Load a language model; under `mlx.launch`, the part of it that this process is to have.

    Args:
        source: an MLX or Hugging Face folder (safetensors), a hub id such as `mlx-community/Qwen3-0.6B-4bit`, a .gguf
            file (converted once, kept in the cache folder), or "demo" for the demonstration model.
        backend: "mlx", "torch" (PyTorch and transformers: `pip install "mlx-lqr[torch]"`), "llama" (llama.cpp, for a
            .gguf file or "demo" as they are: `pip install "mlx-lqr[llama]"`; it runs models and records them, and
            fits nothing), or "auto": MLX on Metal, torch where it finds a CUDA GPU, else MLX on the CPU.
        device: "cpu", "cuda" or "cuda:NUMBER", for torch, which it chooses; by default a GPU where there is one.
        dtype: "float32", "float16" or "bfloat16"; by default the checkpoint's own on a GPU and float32 on the CPU.
        adapter: the folder of a LoRA adapter, of mlx-lm's format or PEFT's, with which the model is to compute.
        pipeline: under `mlx.launch`, let each process have some of the blocks, as models whose weights mlx-lm cannot
            split are spread anyway, and not a part of each weight.
        progress: called as progress(stage, done, total) while a source is fetched or converted.

    Returns:
        A model with every capability that its backend has; whoever needs another one says so.

    Raises:
        InputError: no such source, an unsupported architecture, damaged files, a backend or device that is not here, or
            an adapter that is not this model's or of a kind that is not supported.
    """
    chosen = _chosen(backend, device)
    chosen.check_installed()
    if (pipeline or launched.count() > 1) and not chosen.spreads:
        others = " or ".join(backend.name for backend in registry.backends() if backend.spreads)
        raise InputError(f"{chosen.title} runs a model in one process: --pipeline and mlx.launch are for {others}")
    adapted, suffix = named_adapter(adapter)
    folder, name = (gguf_source if chosen.reads_gguf else resolve)(source, progress=progress)
    return cast(
        Model, chosen.load(folder, name + suffix, dtype=dtype, device=device, adapter=adapted, pipeline=pipeline)
    )


def load_steering(source: str | PathLike[str], model: str = "MODEL") -> steering.Steering:
    """Read a controller, the steering of any other method, or a control vector, whichever the file holds.

    Args:
        source: a file of safetensors, one of GGUF for a control vector of llama.cpp or repeng, or "hf:REPO/FILE" for
            either on the Hugging Face hub, downloaded once.
        model: what the model is called where a command to fit one is named.

    Raises:
        InputError: no such file, or one that is damaged or of another kind; the name of a bundled concept instead of a
            file; or a hub that cannot be reached.
    """
    name = os.fspath(source)
    if not is_on_hub(name):
        return steering.load_steering(source, model)
    from mlx_lqr.convert.hub import hub_file

    file = hub_file(name)
    try:
        return steering.load_steering(file, model)
    except InputError as error:  # which would name a file in the hub's cache
        raise InputError(str(error).replace(str(file), name)) from error


def is_on_hub(source: str) -> bool:
    """Whether a controller is named by its place on the hub, and there is no file of this name."""
    return source.startswith("hf:") and not os.path.exists(source)


def named_adapter(folder: str | PathLike[str] | None) -> tuple[Adapter | None, str]:
    """The adapter in a folder, if one is given, and what it adds to the model's name.

    Raises:
        InputError: no such folder, a damaged one, or an adapter of a kind that is not supported.
    """
    if folder is None:
        return None, ""
    adapter = read_adapter(folder)
    return adapter, f"{ADAPTED}{adapter.name}"


def _chosen(name: str, device: str | None) -> Backend:
    backends = {backend.name: backend for backend in registry.backends()}
    if name == "auto" and launched.count() > 1:
        name = _most_suitable([backend for backend in backends.values() if backend.spreads]).name
    with_devices = [backend for backend in backends.values() if backend.takes_device]
    if name == "auto":
        return _most_suitable(list(backends.values()) if device is None else with_devices)
    if name not in backends:
        raise InputError(f"there is no backend {name!r}: use {', '.join(['auto', *backends])}")
    chosen = backends[name]
    if device is not None and not chosen.takes_device:
        others = " or ".join(backend.name for backend in with_devices)
        raise InputError(f"{chosen.title} chooses its device itself: --device and device= are for the {others} backend")
    return chosen


def preferred_backend() -> str:
    """The backend that "auto" takes on this machine: MLX on Metal, torch on CUDA, MLX on a bare CPU."""
    return _most_suitable(registry.backends()).name


def _most_suitable(backends: Sequence[Backend]) -> Backend:
    return max(backends, key=lambda backend: backend.suitability())


def adopt(model: Any) -> Model:
    """A `Model` around what the caller already has: one of ours as it is, a framework's own object wrapped.

    Raises:
        InputError: neither of these, or an architecture that is not supported.
    """
    if RUNNER.is_of(model):
        return cast(Model, model)
    backends = registry.backends()
    for backend in backends:
        if (adopted := backend.adopt(model)) is not None:
            return cast(Model, adopted)
    *others, last = (backend.adopts for backend in backends if backend.adopts)
    raise InputError(
        f"cannot steer a {type(model).__name__}: give what {', '.join(['mlx_lqr.load', *others])} or {last} returned"
    )


def running_backend(source: str, name: BackendName, *, as_it_is: bool = True) -> BackendName:
    """The backend for somebody who only runs a model: where "auto" would take a bare CPU for a GGUF file, one that
    runs such files as they are, if there is one.

    Args:
        source, name: see `load`.
        as_it_is: whether the file is to be run with nothing else, such as an adapter, and in its own dtype.
    """
    backends, file = registry.backends(), Path(source).expanduser()
    if name != "auto" or not as_it_is or launched.count() > 1 or file.suffix != ".gguf" or not file.is_file():
        return name
    if _most_suitable(backends).suitability() > Suitability.CPU:
        return name
    reading = (backend.name for backend in backends if backend.reads_gguf and backend.reads(file))
    return cast(BackendName, next(reading, name))


def able_to_fit(model: Runner, *, progress: Progress | None = None) -> Differentiable:
    """The model, or the same one on a backend that can differentiate it, where this one only runs its file.

    Raises:
        InputError: there is no such file, or it cannot be loaded.
    """
    if DIFFERENTIABLE.is_of(model):
        return cast(Differentiable, model)
    file = getattr(model, "file", None)
    if file is None:
        return require(model, DIFFERENTIABLE, "fit controllers")
    return load(file, progress=progress)


def gguf_source(source: str | PathLike[str], *, progress: Progress | None = None) -> tuple[Path, str]:
    """The GGUF file behind a source, and the model's name.

    Raises:
        InputError: it is another one.
    """
    from mlx_lqr.convert import sources

    text = os.fspath(source)
    if text == "demo":
        return sources.demo_gguf_file(progress=progress), sources.DEMO_NAME
    path = Path(text).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path, path.stem
    if path.suffix == ".gguf":
        raise InputError(f"{text} does not exist: give a .gguf file")
    able = " or ".join(backend.name for backend in registry.backends() if not backend.reads_gguf)
    raise InputError(f"llama.cpp runs .gguf files, and {text} is none: use --backend {able}")


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
