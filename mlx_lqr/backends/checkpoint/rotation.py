"""Rotary position embeddings as a config.json asks for them: an angle per position for each pair of dimensions.

Dimension pair i of a head turns by position x frequency_i, and is multiplied by one number:

    default     f_i = theta^(-2i / dims)
    linear      f_i / factor
    llama3      f_i / factor for long waves, f_i for short ones, a blend between
    yarn        a blend of f_i / factor and f_i by how often a pair turns within the original context
    longrope    f_i / short_factor_i within the original context; beyond it transformers changes all of them at once
    dynamic     f_i within the context; beyond it transformers lets theta grow

The meaning is that of transformers (`modeling_rope_utils.py`). The last two depend on how long a text is by now:
`limit` says up to where they are these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_lqr.errors import InputError, quoted

_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor"),
}
_LISTS = ("short_factor", "long_factor")
_ALWAYS = ("type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "finetuned")
_NEEDS_ORIGINAL = ("llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding.

    `dims` is how many dimensions of a head turn, `parameters` the settings in transformers' words, every one written
    out.
    """

    kind: str
    theta: float
    dims: int
    parameters: dict[str, Any] = field(compare=False)
    limit: int | None = None
    """Up to how many tokens the frequencies are these; None for any number."""

    @property
    def frequencies(self) -> NDArray[np.float64]:
        """(dims / 2,)"""
        plain = self.theta ** (-np.arange(0, self.dims, 2) / self.dims)
        get: Any = self.parameters.get
        if self.kind == "linear":
            return plain / get("factor")
        if self.kind == "llama3":
            return _llama3(plain, self.parameters)
        if self.kind == "yarn":
            return _yarn(plain, self.theta, self.dims, self.parameters)
        if self.kind == "longrope":
            return plain / np.asarray(get("short_factor"), np.float64)
        return plain

    @property
    def scale(self) -> float:
        """What queries and keys are multiplied by where they turn."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        get: Any = self.parameters.get
        stated, factor = get("attention_factor"), get("factor")
        if stated is not None:
            return float(stated)
        if self.kind == "longrope":
            return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(self._original))
        if get("mscale") and get("mscale_all_dim"):
            return _mscale(factor, get("mscale")) / _mscale(factor, get("mscale_all_dim"))
        return _mscale(factor, 1.0)

    @property
    def _original(self) -> int:
        return int(self.parameters["original_max_position_embeddings"])


def rotation(
    given: Mapping[str, Any],
    key: str,
    *,
    theta: float,
    head_dim: int,
    context: int,
    original: int | None,
    partial: bool,
) -> Rotation:
    """The rotary embedding that `given` (config.json's rope_parameters or rope_scaling) asks for.

    Args:
        key: what `given` is called there.
        theta: where `given` states none.
        context: max_position_embeddings.
        original: the context before it was extended, where it stands outside `given`.
        partial: whether the family can turn a part of each head alone.

    Raises:
        InputError: a kind or a setting that neither backend knows, or one that is missing.
    """
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _REQUIRED:
        raise InputError(f"config.json's {key} is of the type {quoted(kind)}: supported are {', '.join(_REQUIRED)}")
    used = (*_REQUIRED[kind], *_OPTIONAL.get(kind, ()))
    for name, value in given.items():
        if name not in used and name not in _ALWAYS and value is not None:
            raise InputError(
                f"config.json's {key} has {name} = {quoted(value)}, which RoPE of the type {kind!r} does not know: "
                "remove it, or use another model"
            )
    for name in _REQUIRED[kind]:
        if given.get(name) is None:
            raise InputError(
                f"config.json's {key} is of the type {quoted(kind)} and lacks {name}: download the model again"
            )
    share = given.get("partial_rotary_factor", 1.0)
    _check_number(key, "partial_rotary_factor", share)
    if share > 1:
        raise InputError(f"config.json says partial_rotary_factor {share}, more than a whole head: download it again")
    if share != 1 and not partial:
        raise InputError(
            f"config.json says partial_rotary_factor {share}, which this family has not: use another model"
        )
    dims = int(head_dim * share)
    _check_number(key, "rope_theta", given.get("rope_theta", theta))
    parameters = {"rope_type": kind, "rope_theta": given.get("rope_theta", theta)}
    if partial:
        parameters["partial_rotary_factor"] = share
    for name in used:
        value = given.get(name)
        if value is None:
            continue
        for number in _list(key, name, value, dims) if name in _LISTS else [value]:
            _check_number(key, name, number)
        parameters[name] = value
    if kind in _NEEDS_ORIGINAL:
        before = given.get("original_max_position_embeddings")
        before = original if original is not None else before if before is not None else context
        if isinstance(before, bool) or not isinstance(before, int) or before < 2:
            raise InputError(
                f"config.json says original_max_position_embeddings {quoted(before)}: download the model again"
            )
        parameters["original_max_position_embeddings"] = before
        if kind == "longrope":
            parameters.setdefault("factor", context / before)
    limit = {"longrope": parameters.get("original_max_position_embeddings"), "dynamic": context}.get(kind)
    turn = Rotation(kind, float(parameters["rope_theta"]), dims, parameters, limit)
    _check_computed(key, turn)
    return turn


def _check_computed(key: str, turn: Rotation) -> None:
    """Raise `InputError` for numbers that are sound one by one and give no rotation together."""
    try:
        with np.errstate(all="ignore"):
            finite = np.isfinite(turn.frequencies).all() and math.isfinite(turn.scale)
    except (ArithmeticError, ValueError):
        finite = False
    if not finite:
        raise InputError(f"config.json's {key} gives angles that are not finite: download the model again")


def _list(key: str, name: str, value: Any, dims: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != dims // 2:
        raise InputError(f"config.json's {key} must give {name} as {dims // 2} numbers: download the model again")
    return value


def _check_number(key: str, name: str, value: Any) -> None:
    if name == "truncate":
        wrong = not isinstance(value, bool)
    else:
        wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf
        wrong = wrong or (value == 0 and not name.startswith("mscale"))
    if wrong:
        raise InputError(f"config.json's {key} says {name} {quoted(value)}: download the model again")


def _llama3(plain: NDArray[np.float64], given: dict[str, Any]) -> NDArray[np.float64]:
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    turns = given["original_max_position_embeddings"] * plain / (2 * math.pi)  # within the original context
    blend = np.clip((turns - low) / (high - low), 0, 1) if high != low else (turns >= low).astype(np.float64)
    return (1 - blend) * plain / given["factor"] + blend * plain


def _yarn(plain: NDArray[np.float64], theta: float, dims: int, given: dict[str, Any]) -> NDArray[np.float64]:
    def dimension(turns: float) -> float:
        original = given["original_max_position_embeddings"]
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(given.get("beta_fast") or 32), dimension(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / ((high - low) or 0.001), 0, 1)
    return ramp * plain / given["factor"] + (1 - ramp) * plain


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1
