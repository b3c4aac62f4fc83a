"""Every process of a group with a part of each weight, by mlx-lm's own `shard`."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lqr.errors import InputError, first_line

_INSTEAD = "use another number of them, or --pipeline"


def can_shard(module: nn.Module) -> bool:
    """Whether mlx-lm splits the weights of such models."""
    return hasattr(module, "shard")


def shard(module: Any, group: mx.distributed.Group) -> None:
    """Keep this process's part of each weight.

    Raises:
        InputError: sizes that the number of processes does not divide.
    """
    count = group.size()
    before = {id(part): (part, _sizes(part)) for part in module.modules()}
    try:
        module.shard(group)
    except (ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"this model cannot be split into {count} parts ({first_line(error)}): {_INSTEAD}") from error
    for part, sizes in before.values():
        for name, size in sizes.items():
            if _sizes(part).get(name) not in (size, size / count):
                raise InputError(
                    f"this model cannot be split into {count} parts, for {count} does not divide its {name} {size}: "
                    f"{_INSTEAD}"
                )


def refuse_split(module: nn.Module) -> None:
    """Raise `InputError` for a model that mlx-lm has split: a process's part of the weights has no Jacobian in it."""
    if any(type(part).__module__ == nn.AllToShardedLinear.__module__ for part in module.modules()):
        raise InputError(
            "mlx_lm has split this model over several processes: it can be steered as it is; to fit or to adapt, load "
            "it with mlx_lqr.load"
        )


def _sizes(part: nn.Module) -> dict[str, int]:
    """The numbers that a module has for attributes, such as those of its heads: mlx-lm divides without a look."""
    return {name: value for name, value in vars(part).items() if type(value) is int and value > 0}
