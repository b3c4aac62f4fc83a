"""An adapter's folder (adapter_config.json and safetensors) -> an `Adapter`, in either of the two formats.

Nothing is unpickled. What a config says that is not done here is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lqr.backends.checkpoint import adapter_mlx_lm, adapter_peft
from mlx_lqr.backends.checkpoint.adapter import Adapter, Change, Weight
from mlx_lqr.errors import InputError, first_line
from mlx_lqr.files.json_text import read_json_object

CONFIG = "adapter_config.json"


def read_adapter(source: str | PathLike[str]) -> Adapter:
    """The adapter in a folder.

    Raises:
        InputError: there is no such folder, it is damaged or holds pickled weights, or it is an adapter of a kind that
            is not supported.
    """
    folder = Path(source).expanduser()
    config = _config(folder)
    name = folder.resolve().name
    if "peft_type" in config:
        changes = adapter_peft.changes(name, config, _weights(folder, adapter_peft.WEIGHTS))
        return _checked(Adapter(name, changes, _text(config.get("base_model_name_or_path")), is_peft=True))
    if adapter_mlx_lm.is_config(config):
        changes = adapter_mlx_lm.changes(name, config, _weights(folder, adapter_mlx_lm.WEIGHTS))
        return _checked(Adapter(name, changes, _text(config.get("model"))))
    raise InputError(
        f"{folder / CONFIG} is of no format that is known: it has neither peft_type (PEFT) nor lora_parameters (mlx-lm)"
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
        raise InputError(f"{what}: give the folder of a LoRA adapter (fetch one of the hub with `hf download`)")
    file = folder / CONFIG
    if not file.is_file():
        raise InputError(f"{folder} is no adapter, for it has no {CONFIG}: give the folder that mlx-lm or PEFT wrote")
    return read_json_object(file, "save the adapter again")


def _weights(folder: Path, name: str) -> dict[str, Weight]:
    file = folder / name
    if not file.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise InputError(
                f"{folder} has its weights pickled in adapter_model.bin, which is never read, since that could run any "
                "code: save it again with a PEFT of 2023 or newer, which writes safetensors"
            )
        raise InputError(f"{folder} has no {name}: save or download the adapter again")
    from safetensors import SafetensorError, deserialize  # which the smallest runtime does without

    try:
        tensors = deserialize(file.read_bytes())  # type: ignore[no-untyped-call]
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged or incomplete: save or download it again ({first_line(error)})") from error
    if not tensors:
        raise InputError(f"{file} is empty: save or download the adapter again")
    return {name: _array(file, name, tensor) for name, tensor in tensors}


def _array(file: Path, name: str, tensor: Mapping[str, Any]) -> Weight:
    kind, shape = tensor["dtype"], tensor["shape"]
    if kind == "BF16":  # which NumPy has not: the upper half of a float32
        halves = np.frombuffer(tensor["data"], np.uint16).astype(np.uint32)
        return (halves << 16).view(np.float32).reshape(shape)
    if kind not in ("F16", "F32", "F64"):
        raise InputError(f"{file} has {name} as {kind}: save the adapter in 16 or 32 bits")
    values = np.frombuffer(tensor["data"], {"F16": np.float16, "F32": np.float32, "F64": np.float64}[kind])
    return values.reshape(shape).astype(np.float32)


def _checked(adapter: Adapter) -> Adapter:
    """The adapter, which must do something, with finite numbers."""
    if not adapter.changes:
        raise InputError(f"the adapter {adapter.name} changes nothing: save or download it again")
    for name, change in adapter.changes.items():
        if not all(part is None or np.isfinite(part).all() for part in _parts(change)):
            raise InputError(f"the adapter {adapter.name} has numbers for {name} that are not finite: train it again")
    return adapter


def _parts(change: Change) -> tuple[Weight | None, ...]:
    return change.replacement, change.up, change.down, change.magnitude
