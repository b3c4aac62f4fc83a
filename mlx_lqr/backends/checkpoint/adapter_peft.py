"""Adapters as Hugging Face's PEFT writes them: `lora_A` and `lora_B` beside the names of transformers' modules.

    a layer       A = lora_A (r, columns), B = lora_B (rows, r):                       W + scale B A
    embeddings    A = lora_embedding_A (r, rows), B = lora_embedding_B (columns, r):   W + scale (B A)'

The scale is lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA; `rank_pattern` and `alpha_pattern` say otherwise for
modules whose names they match. Modules to save, and biases, are there whole.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from mlx_lqr.backends.checkpoint import adapter_peft_experts as experts
from mlx_lqr.backends.checkpoint.adapter import Change, Weight, canonical
from mlx_lqr.errors import InputError, quoted

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."

_READ = frozenset(
    {
        "alpha_pattern",
        "bias",
        "lora_alpha",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "use_dora",
        "use_rslora",
    }
)
_OF_TRAINING = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",  # use_qalora is refused
        "revision",
        "target_modules",
        "task_type",
    }
)
"""Keys that say how the adapter was made, or which modules it has; the weights say that too."""
_LEAVE_THE_MODEL = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights; the others change the model's own weights too when an adapter is loaded."""


def changes(name: str, config: Mapping[str, Any], weights: Mapping[str, Weight]) -> dict[str, Change]:
    """What the adapter called `name` makes of each weight.

    Raises:
        InputError: a kind of adapter that is not supported, or weights that are not what the config says.
    """
    _check_config(name, config)
    changed: dict[str, dict[str, Weight]] = defaultdict(dict)
    for key, values in weights.items():
        module, part = _split(name, config, key)
        changed[module][part] = values
    by_weight: dict[str, Change] = {}
    single: dict[str, dict[int, Change]] = defaultdict(dict)
    wrappers: dict[str, list[dict[str, Weight]]] = defaultdict(list)
    for module, parts in changed.items():
        path = canonical(module)
        if (wrapped := experts.wrapped(path)) is not None:
            wrappers[wrapped].append(parts)
        elif (expert := experts.expert(path)) is not None:
            weight, number = expert
            single[weight][number] = _changes_of_module(name, config, module, parts).get("weight", Change())
        else:
            own = _changes_of_module(name, config, module, parts)
            by_weight |= {f"{path}.{tensor}": change for tensor, change in own.items()}
    for weight, changes_of_experts in single.items():
        by_weight[weight] = experts.stacked(name, weight, changes_of_experts)
    for module, wrapping in wrappers.items():
        ranks = partial(_rank_and_scale, name, config)
        by_weight |= experts.of_parameters(name, config, module, wrapping, ranks)
    return by_weight


def _check_config(name: str, config: Mapping[str, Any]) -> None:
    kind = config["peft_type"]
    if kind != "LORA":
        raise InputError(f"the adapter {name} is of PEFT's type {kind}: supported is LORA (DoRA and rsLoRA too)")
    for key, value in config.items():
        if key == "init_lora_weights":
            wrong = value not in _LEAVE_THE_MODEL
        elif key == "target_parameters":
            wrong = any(not str(target).endswith(experts.PARAMETERS) for target in value or ())
        else:
            wrong = key not in _READ | _OF_TRAINING and value not in (None, False, "", [], {})
        if wrong:
            raise InputError(
                f"the adapter {name} says {key} {quoted(value)}, which is not done here: merge it into its model with "
                "PEFT (merge_and_unload) and load that"
            )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise InputError(f"the adapter {name} says bias {quoted(config['bias'])}: use none, all or lora_only")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise InputError(f"the adapter {name} says {key} {quoted(config[key])}, which is no table: save it again")


def _split(name: str, config: Mapping[str, Any], key: str) -> tuple[str, str]:
    """The module that a tensor belongs to, and what it is there: a matrix of LoRA, or the module's weight or bias."""
    if not key.startswith(_PREFIX):
        raise InputError(f"the adapter {name} has {key}, which does not begin with {_PREFIX}: save it again with PEFT")
    path = key.removeprefix(_PREFIX)
    matrix = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", path)
    matrix = matrix or re.fullmatch(r"(.+)\.(lora_embedding_[AB])", path)
    if matrix is not None:
        return matrix[1], matrix[2]
    module, _, tensor = path.rpartition(".")
    own = module.removesuffix(".base_layer").removesuffix(".modules_to_save")
    saved = own != module or _is_saved(own, config.get("modules_to_save") or ())
    biased = tensor == "bias" and config.get("bias", "none") != "none"
    if tensor not in ("weight", "bias") or not (saved or biased):
        raise InputError(f"the adapter {name} has {key}, of which its config says nothing: save it again with PEFT")
    return own, tensor


def _is_saved(module: str, names: Any) -> bool:
    """Whether a module, or one that it is a part of, is among the modules to save."""
    return any(module.endswith(name) or f".{name}." in f".{module}." for name in names)


def _changes_of_module(
    name: str, config: Mapping[str, Any], module: str, parts: Mapping[str, Weight]
) -> dict[str, Change]:
    """The changes of a module's weight and bias."""
    own: dict[str, Change] = {}
    if "bias" in parts:
        own["bias"] = Change(replacement=parts["bias"])
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    keys = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if not set(parts) - {"weight", "bias"}:
        return own | {"weight": Change(replacement=parts["weight"])} if "weight" in parts else own
    if lacking := [key for key in keys if key not in parts]:
        raise InputError(f"the adapter {name} lacks {lacking[0]} for {module}: save or download it again")
    a, b = (parts[key] for key in keys)
    rank, scale = _rank_and_scale(name, config, module)
    if not a.ndim == b.ndim == 2 or not a.shape[0] == b.shape[1] == rank:
        raise InputError(
            f"the adapter {name} has {keys[0]} {a.shape} and {keys[1]} {b.shape} for {module}, which are not of rank "
            f"{rank}: save or download it again"
        )
    magnitude = parts.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        what = "no magnitudes" if magnitude is None else "magnitudes"
        raise InputError(f"the adapter {name} has {what} for {module}, but use_dora is {config.get('use_dora')}")
    if magnitude is not None and embedding:
        raise InputError(f"the adapter {name} is DoRA of {module}: merge it into its model with PEFT")
    up, down = (a.T, b.T) if embedding else (b, a)
    return own | {"weight": Change(parts.get("weight"), np.float32(scale) * up, down, magnitude)}


def _rank_and_scale(name: str, config: Mapping[str, Any], module: str) -> tuple[int, float]:
    rank = _matching(config.get("rank_pattern"), module, config.get("r"))
    alpha = _matching(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"the adapter {name} says r {quoted(rank)}: save or download it again")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise InputError(f"the adapter {name} says lora_alpha {quoted(alpha)}: save or download it again")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matching(pattern: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of the first key that matches the end of the module's name, as PEFT takes it."""
    for key, value in (pattern or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise InputError(f"the adapter's config has the pattern {quoted(key)}, which is none: {error}") from error
    return otherwise
