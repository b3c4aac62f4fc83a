"""Adapters as mlx-lm's trainer writes them: `lora_a`, `lora_b` and, for DoRA, `m`, beside the names of its modules.

    a layer       lora_a (columns, r), lora_b (r, rows):         W + scale (lora_a lora_b)'
    embeddings    lora_a (rows, r), lora_b (r, columns):         W + scale lora_a lora_b
    experts       lora_a (E, r, columns), lora_b (E, rows, r):   W + scale lora_b lora_a

Its loader reads three keys of the config, `fine_tune_type`, `num_layers` and `lora_parameters`; the others are notes of
the training. `num_layers` and `lora_parameters.keys` say which layers were trained, and so do the weights themselves.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_lqr.backends.checkpoint.adapter import EMBEDDINGS, Change, Weight, canonical
from mlx_lqr.errors import InputError, quoted

WEIGHTS = "adapters.safetensors"
_KINDS = ("lora", "dora", "full")
_PARAMETERS = ("rank", "scale", "dropout", "keys", "alpha")
"""`alpha` stood in the configs of early versions, and was not read either where there was a scale."""


def is_config(config: Mapping[str, Any]) -> bool:
    return not {"fine_tune_type", "lora_parameters"}.isdisjoint(config)


def changes(name: str, config: Mapping[str, Any], weights: Mapping[str, Weight]) -> dict[str, Change]:
    """What the adapter called `name` makes of each weight.

    Raises:
        InputError: another kind of training, or weights that are not what the config says.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind not in _KINDS:
        raise InputError(f"the adapter {name} has the fine_tune_type {quoted(kind)}: supported are {', '.join(_KINDS)}")
    if kind == "full":
        return {canonical(weight): Change(replacement=values) for weight, values in weights.items()}
    rank, scale = _rank_and_scale(name, config.get("lora_parameters"))
    parts: dict[str, dict[str, Weight]] = defaultdict(dict)
    for weight, values in weights.items():
        module, _, part = weight.rpartition(".")
        if part not in ("lora_a", "lora_b", "m") or (part == "m" and kind != "dora"):
            raise InputError(f"the adapter {name} has {weight}, which is no part of a {kind} adapter: save it again")
        parts[f"{canonical(module)}.weight"][part] = values
    return {weight: _change(name, weight, own, rank, scale, kind) for weight, own in parts.items()}


def _rank_and_scale(name: str, parameters: Any) -> tuple[int, float]:
    if not isinstance(parameters, dict):
        raise InputError(f"the adapter {name} has no lora_parameters in its config: save or download it again")
    if unknown := sorted(set(parameters) - set(_PARAMETERS)):
        raise InputError(
            f"the adapter {name} says {unknown[0]} {quoted(parameters[unknown[0]])} in lora_parameters, which is not "
            "known here: fuse it into its model with mlx_lm.fuse"
        )
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"the adapter {name} says rank {quoted(rank)} in lora_parameters: save or download it again")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise InputError(f"the adapter {name} says scale {quoted(scale)} in lora_parameters: save or download it again")
    return rank, float(scale)


def _change(name: str, weight: str, parts: Mapping[str, Weight], rank: int, scale: float, kind: str) -> Change:
    needed = {"lora_a", "lora_b"} | ({"m"} if kind == "dora" else set())
    if lacking := sorted(needed - set(parts)):
        raise InputError(f"the adapter {name} lacks {lacking[0]} for {weight}: save or download it again")
    a, b = parts["lora_a"], parts["lora_b"]
    dimensions = 3 if a.ndim == 3 else 2  # experts have three
    if dimensions == 3:
        up, down = b, a
    elif weight == EMBEDDINGS:
        up, down = a, b
    else:
        up, down = b.T, a.T
    if not up.ndim == down.ndim == dimensions or not up.shape[-1] == down.shape[-2] == rank:
        raise InputError(
            f"the adapter {name} has lora_a {a.shape} and lora_b {b.shape} for {weight}, which are not of rank {rank}: "
            "save or download it again"
        )
    magnitude = parts.get("m")
    if magnitude is not None and dimensions == 3:
        raise InputError(f"the adapter {name} is DoRA of experts, which mlx-lm has not either: use LoRA for {weight}")
    return Change(up=np.float32(scale) * up, down=down, magnitude=magnitude)
