"""Where an adapter's changes belong in an mlx-lm module that has other names, or other forms, than the checkpoint.

PEFT names the modules of transformers. mlx-lm's module says itself how a checkpoint's names become its own: its
`sanitize`, which here is given a mark for every weight that is changed. A mark that comes out as it went in, under the
name of a weight that the module has, says where the change belongs. A weight that is cut, joined or turned does not
come out so, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lqr.backends.checkpoint.adapter import Adapter, canonical
from mlx_lqr.errors import InputError

_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: name.replace("model.language_model.", "language_model.model.", 1),
    lambda name: f"language_model.{name}",
)
"""A name in transformers -> in the checkpoint: it may have moved the part for text, or left out all others."""


def by_own_names(module: nn.Module, adapter: Adapter, names: Collection[str]) -> Adapter:
    """PEFT's adapter with the names of the module's weights; one of mlx-lm's has them already.

    Args:
        names: of the module's weights, canonical.

    Raises:
        InputError: a weight that the module has in another form, or not at all.
    """
    if not adapter.is_peft:
        return adapter
    for name, change in adapter.changes.items():
        if change.experts is None and change.up is not None and change.up.ndim == 3:
            raise _unclear(adapter, name)  # families differ in how a tensor of all experts lies
    stacked = {name for name, change in adapter.changes.items() if change.experts is not None}
    plain = [name for name in adapter.changes if name not in stacked]
    found: dict[str, str] = {}
    for spelling in _SPELLINGS:
        found = _found(module, adapter, {name: spelling(name) for name in plain}, names)
        found |= {name: spelling(name) for name in stacked if spelling(name) in names}
        if len(found) == len(adapter.changes):
            break
    if missing := [name for name in adapter.changes if name not in found]:
        raise _unclear(adapter, missing[0])
    return replace(adapter, changes={found[name]: change for name, change in adapter.changes.items()})


def _found(module: nn.Module, adapter: Adapter, spelled: dict[str, str], names: Collection[str]) -> dict[str, str]:
    """The module's own name of each weight that has one."""
    marks = {spelling: mx.zeros(adapter.changes[name].shape or ()) for name, spelling in spelled.items()}
    by_mark = {id(marks[spelling]): name for name, spelling in spelled.items()}
    sanitised = _sanitised(module, marks)
    own = {by_mark[id(mark)]: canonical(name) for name, mark in sanitised.items() if id(mark) in by_mark}
    return {name: place for name, place in own.items() if place in names}


def _sanitised(module: nn.Module, marks: dict[str, mx.array]) -> dict[str, mx.array]:
    """What a module makes of them, alone, or beside weights of its own where it asks for some of these."""
    if not hasattr(module, "sanitize"):
        return marks
    for others in ({}, dict(tree_flatten(module.parameters()))):
        try:
            another = type(module)(module.args)  # some change themselves by what they are given; nothing is computed
            sanitised: dict[str, mx.array] = another.sanitize({**others, **marks})
            return sanitised
        except Exception:  # whatever mlx-lm's modules raise, nothing is known of the names
            continue
    return {}


def _unclear(adapter: Adapter, name: str) -> InputError:
    return InputError(
        f"the adapter {adapter.name} changes {name}, which mlx-lm's model has in another form, or not at all: merge it "
        f"into the model that it was trained on with PEFT{f' ({adapter.base})' if adapter.base else ''}"
    )
