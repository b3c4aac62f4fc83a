"""What every backend asks of a model folder's config: that it is sound, and of a family that can be steered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_lqr.backends.checkpoint.families import SETTINGS
from mlx_lqr.errors import InputError, quoted
from mlx_lqr.files.json_text import LAYERS, WIDTH, read_json_object

DTYPES = ("float32", "float16", "bfloat16")
"""What the weights of a model may be loaded as."""

FAMILIES = tuple(SETTINGS)
"""The model types whose blocks are known to carry one dense residual stream."""


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, of a model to be run.

    Raises:
        InputError: see `stated_config`; or it names code of the hub to run.
    """
    config = stated_config(folder)
    for key, name in _implementations(config):
        if "/" in name:
            raise InputError(f"{folder} wants to run code of the hub ({quoted(key)}: {quoted(name)}): refused")
    return config


def stated_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json as it stands there.

    Raises:
        InputError: there is none, it is damaged, it says sizes that no model has, or it needs code of its own.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{folder} has no config.json: give the folder of a whole model")
    config = read_json_object(file)
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{file} states no model_type: give the folder of a language model")
    for part in (config, config.get("text_config")):
        _check_sizes(part if isinstance(part, dict) else {})
    if "model_file" in config:
        needed = quoted(config["model_file"])
        raise InputError(f"{folder} needs its own code ({needed}), which is never run: use another model")
    return config


def _implementations(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, name) of everything in config.json that names code to compute with, such as attn_implementation.

    transformers takes a name with a slash for a repository, of whose code it runs a part.
    """
    if isinstance(content, dict):
        for name, part in content.items():
            yield from _implementations(part, name if "implementation" in name else key)
    elif isinstance(content, list):
        for part in content:
            yield from _implementations(part, key)
    elif key and isinstance(content, str):
        yield key, content


_LARGEST = {
    LAYERS: ("num_hidden_layers", "num_layers", "n_layers", "n_layer"),
    WIDTH: (
        *("hidden_size", "n_embd", "d_model", "head_dim", "num_attention_heads", "num_key_value_heads"),
        *("num_experts", "num_local_experts"),
    ),
    1 << 25: ("vocab_size", "intermediate_size", "moe_intermediate_size"),
}
"""What is above is no model: a library that is asked to build it fills the memory before it looks at any weight."""


def _check_sizes(config: Mapping[str, Any]) -> None:
    for largest, names in _LARGEST.items():
        for name in names:
            value = config.get(name)
            if isinstance(value, (int, float)) and value > largest:
                raise InputError(f"config.json says {name} {value}, which no model has: download the model again")


def check_dtype(dtype: str | None) -> None:
    """Raise `InputError` for a dtype that no model can be loaded as."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")


def check_family(model_type: str, families: Sequence[str] = FAMILIES) -> None:
    """Raise `InputError` for an architecture that is not known to carry one residual stream from block to block."""
    if model_type not in families:
        raise InputError(
            f"the architecture {quoted(model_type)} is not supported; supported: {', '.join(families)}, and most "
            "others that mlx-lm (--backend mlx) or transformers (--backend torch) has"
        )
