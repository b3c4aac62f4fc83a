"""PEFT's adapters of experts, of which there are two layouts.

transformers 5 has the experts of a layer in two tensors, gate_up_proj (E, 2 I, d) and down_proj (E, d, I), and PEFT
wraps the module that has them once for each (`target_parameters`); the tensors' names do not say which is which:

    lora_A (E r, columns), lora_B (rows, r E):   W_e + scale B_e A_e
    A_e is the rows e r to (e + 1) r of lora_A, B_e the columns e, e + E, e + 2 E, ... of lora_B

Older versions had a module for each expert, with an adapter as any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlx_lqr.backends.checkpoint.adapter import Change, Weight
from mlx_lqr.errors import InputError

PARAMETERS = ("gate_up_proj", "down_proj")
_WRAPPED = re.compile(r"(.*\.mlp\.experts)((?:\.base_layer)*)")
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)")
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Mixtral's names -> those of all others"""


def wrapped(module: str) -> str | None:
    """The module of experts that a module with matrices wraps, or None."""
    match = _WRAPPED.fullmatch(module)
    return match and match[1]


def expert(module: str) -> tuple[str, int] | None:
    """The weight of all experts that a module is a part of, and which expert it is; None if it is none."""
    match = _EXPERT.fullmatch(module)
    return match and (f"{match[1]}.{_PROJECTIONS.get(match[3], match[3])}.weight", int(match[2]))


def of_parameters(
    name: str,
    config: Mapping[str, Any],
    experts: str,
    wrappers: Sequence[Mapping[str, Weight]],
    rank_and_scale: Callable[[str], tuple[int, float]],
) -> dict[str, Change]:
    """The changes of a layer's experts, by the names of the weights.

    Args:
        name: the adapter's.
        experts: the module's name.
        wrappers: the matrices of each wrapper.
        rank_and_scale: of the parameter of a name.

    Raises:
        InputError: it cannot be told what is meant, or matrices that do not fit together.
    """
    if any(set(parts) != {"lora_A", "lora_B"} for parts in wrappers):
        raise InputError(f"the adapter {name} lacks lora_A or lora_B for {experts}: save or download it again")
    changes: dict[str, Change] = {}
    for parameter, parts in zip(_parameters(name, config, experts, wrappers), wrappers, strict=True):
        a, b = parts["lora_A"], parts["lora_B"]
        rank, scale = rank_and_scale(f"{experts}.{parameter}")
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank:
            raise InputError(
                f"the adapter {name} has lora_A {a.shape} and lora_B {b.shape} for {experts}.{parameter}, which are "
                f"not of rank {rank}: save or download it again"
            )
        down = a.reshape(-1, rank, a.shape[1])
        up = np.float32(scale) * b.reshape(len(b), rank, -1).transpose(2, 0, 1)
        if parameter == "gate_up_proj":
            half = len(b) // 2
            changes[f"{experts}.gate_proj.weight"] = Change(up=up[:, :half], down=down)
            changes[f"{experts}.up_proj.weight"] = Change(up=up[:, half:], down=down)
        else:
            changes[f"{experts}.down_proj.weight"] = Change(up=up, down=down)
    return changes


def _parameters(
    name: str, config: Mapping[str, Any], experts: str, wrappers: Sequence[Mapping[str, Weight]]
) -> Sequence[str]:
    """Which parameter each wrapper adapts: that of shape (2 I, d), or that of shape (d, I)."""
    shapes = [(len(parts["lora_B"]), parts["lora_A"].shape[-1]) for parts in wrappers]
    if len(shapes) == 2:
        for order in (PARAMETERS, PARAMETERS[::-1]):
            (rows, columns), (width, inner) = (shapes[order.index(parameter)] for parameter in PARAMETERS)
            if columns == width and rows == 2 * inner:
                return order
    targets = {str(target).rpartition(".")[2] for target in config.get("target_parameters") or ()}
    if len(shapes) == len(targets) == 1:
        return sorted(targets)
    raise InputError(
        f"the adapter {name} does not say which weights its matrices for {experts} are for: merge it into its model "
        "with PEFT"
    )


def stacked(name: str, weight: str, by_expert: Mapping[int, Change]) -> Change:
    """The changes of single experts as one of the weight of all.

    Raises:
        InputError: what cannot be put together.
    """
    numbers = sorted(by_expert)
    ups, downs = ([getattr(by_expert[n], part) for n in numbers] for part in ("up", "down"))
    whole = any(part is None for part in (*ups, *downs)) or any(by_expert[n].replacement is not None for n in numbers)
    if whole or any(by_expert[n].magnitude is not None for n in numbers):
        raise InputError(f"the adapter {name} has more than LoRA for {weight}: merge it into its model with PEFT")
    if len({part.shape for part in ups}) > 1 or len({part.shape for part in downs}) > 1:
        raise InputError(f"the adapter {name} has several ranks for {weight}: merge it into its model with PEFT")
    return Change(up=np.stack(ups), down=np.stack(downs), experts=tuple(numbers))
