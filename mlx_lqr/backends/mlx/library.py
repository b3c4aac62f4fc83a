"""mlx-lm as this backend sees it: its model classes, and all that is private in it or may be renamed.

What is taken from it stands here and in `evaluator.py`, a subclass of its evaluator, and nowhere else; `borrowed.py`
lists it and looks whether it is there.

The model classes come without the 3 seconds that `import mlx_lm` takes: `mlx_lm/__init__.py` imports its generation
code and with it transformers, and the model files need neither. So they are imported below a stand-in for the package,
which then goes. Whoever imports `mlx_lm` afterwards gets the real package with these very modules in it: there is one
copy of every class.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lqr.backends.borrowed import check_borrowed
from mlx_lqr.backends.checkpoint.model_folder import FAMILIES, check_family
from mlx_lqr.errors import InputError

_SINCE = {"qwen3_moe": (0, 32)}
"""Families that older versions of mlx-lm have, but cannot differentiate."""

_REMAPPED = {"mistral": "llama"}
_one_import = threading.RLock()


def import_mlx_lm(submodule: str) -> ModuleType:
    """Import `mlx_lm.<submodule>` at its own cost alone, where it needs nothing of the package's `__init__`."""
    with _one_import:  # or another thread would find the stand-in, or lose it on the way
        if "mlx_lm" in sys.modules:
            return importlib.import_module(f"mlx_lm.{submodule}")
        with _stand_in():
            return importlib.import_module(f"mlx_lm.{submodule}")


def is_supported(model_type: str) -> bool:
    """Whether the family can be steered with the mlx-lm that is installed."""
    installed = tuple(int(number) for number in metadata.version("mlx-lm").split(".")[:2])
    return model_type in FAMILIES and installed >= _SINCE.get(model_type, (0, 0))


def model_classes(model_type: str) -> tuple[Any, Any]:
    """The `Model` and `ModelArgs` classes of a supported family.

    Raises:
        InputError: another architecture, with the list of those supported.
    """
    check_family(model_type)
    if not is_supported(model_type):
        needed = ".".join(map(str, _SINCE[model_type]))
        raise InputError(f"{model_type} needs mlx-lm {needed}: pip install -U mlx-lm (with Python 3.11 or newer)")
    module = import_mlx_lm(f"models.{_REMAPPED.get(model_type, model_type)}")
    return module.Model, module.ModelArgs


def any_model_classes(model_type: str) -> tuple[Any, Any]:
    """The `Model` and `ModelArgs` classes of any architecture that the installed mlx-lm has.

    Raises:
        InputError: it has none of this name.
    """
    try:
        module = import_mlx_lm(f"models.{model_type}")
    except ImportError as error:
        raise InputError(f"the installed mlx-lm has no {model_type}: pip install -U mlx-lm") from error
    return module.Model, module.ModelArgs


def has_model(model_type: str) -> bool:
    """Whether mlx-lm has a module for models of this type, whatever they are."""
    if not re.fullmatch(r"[\w-]+", model_type):
        return False
    if model_type in FAMILIES or settings_read({"model_type": model_type}) is not None:
        return True
    return model_type in vars(importlib.import_module("mlx_lm.utils")).get("MODEL_REMAPPING", {})


def is_measured(model_type: str) -> bool:
    """Whether models of this type are on no list and mlx-lm has a module for them, so that they are measured."""
    return model_type not in FAMILIES and has_model(model_type)


def settings_read(config: dict[str, Any]) -> set[str] | None:
    """The config's keys that mlx-lm's model of this type reads, or None if it has no such model."""
    model_type = str(config.get("model_type"))
    try:
        ModelArgs = import_mlx_lm(f"models.{_REMAPPED.get(model_type, model_type)}").ModelArgs
    except (ImportError, AttributeError, SystemExit):  # no such module, one that is no model, or that wants another
        return None
    return {field.name for field in fields(ModelArgs)}


def settings_of(module: nn.Module) -> dict[str, Any]:
    """What a model was made of, which some of mlx-lm's modules call `args` and some `config`, and some do not keep."""
    return next((vars(getattr(module, name)) for name in ("args", "config") if hasattr(module, name)), {})


def attention_mask(x: mx.array, cache: Any, window: int | None, *, as_array: bool) -> Any:
    """The mask with which a block attends, by what its cache holds."""
    make_mask = import_mlx_lm("models.base").create_attention_mask
    return make_mask(x, cache, window_size=window, return_array=as_array)


def filters() -> Any:
    """The module with `apply_top_p`, `apply_min_p` and `apply_top_k`."""
    return import_mlx_lm("sample_utils")


def window_caches(windows: Sequence[int | None]) -> list[Any]:
    """A cache for each block: of its window, or of everything."""
    kinds = import_mlx_lm("models.cache")
    return [kinds.KVCache() if window is None else kinds.RotatingKVCache(window) for window in windows]


def decoding_caches(module: nn.Module, padding: list[int], window: int | None, sinks: int) -> list[Any]:
    """A cache for each block, for sequences with this much padding on their left.

    Args:
        window: how many tokens a single sequence keeps at most, `sinks` of them the oldest; None for all.
    """
    kinds = import_mlx_lm("models.cache")
    caches: list[Any] = kinds.make_prompt_cache(module)
    if window is not None:
        caches = [
            layer if getattr(layer, "max_size", math.inf) < window else kinds.RotatingKVCache(window, keep=sinks)
            for layer in caches
        ]
    if len(padding) > 1:
        caches = [
            kinds.BatchRotatingKVCache(layer.max_size, padding) if rotates(layer) else kinds.BatchKVCache(padding)
            for layer in caches
        ]
        _mask_grouped_heads(module, caches)
    return caches


def batched_caches(module: nn.Module, sequence: Sequence[Any]) -> list[Any]:
    """The caches of a single sequence as those of a batch of one."""
    caches = merged_caches([sequence])
    _mask_grouped_heads(module, caches)
    return caches


def new_caches(module: nn.Module) -> list[Any]:
    """The module's own caches for sequences of the same length."""
    caches: list[Any] = import_mlx_lm("models.cache").make_prompt_cache(module)
    return caches


def merged_caches(sequences: Sequence[Sequence[Any]]) -> list[Any]:
    """One list of caches for all sequences, from the caches of each."""
    return [layer[0].merge(list(layer)) for layer in zip(*sequences, strict=True)]


def can_merge(caches: Sequence[Any]) -> bool:
    """Whether padding before a sequence may change nothing: it shifts the blocks of keys that a sparse attention picks,
    which has a second cache of keys for picking them."""
    kinds = import_mlx_lm("models.cache")
    lists = [layer.caches for layer in caches if isinstance(layer, kinds.CacheList)]
    return all(sum(isinstance(part, kinds.KVCache) for part in parts) < 2 for parts in lists)


def can_roll(caches: Sequence[Any]) -> bool:
    """Whether all of them are plain or rotating, so that the oldest tokens can be forgotten."""
    kinds = import_mlx_lm("models.cache")
    return all(type(layer) in (kinds.KVCache, kinds.RotatingKVCache) for layer in caches)


def can_rewind(caches: Sequence[Any]) -> bool:
    """Whether tokens can be taken back: not from caches of other kinds, some of which say so and have dropped keys."""
    kinds = import_mlx_lm("models.cache")
    return all(
        can_rewind(layer.caches)
        if isinstance(layer, kinds.CacheList)
        else type(layer) in (kinds.KVCache, kinds.RotatingKVCache) and layer.is_trimmable()
        for layer in caches
    )


def _mask_grouped_heads(module: nn.Module, caches: Sequence[Any]) -> None:
    """Let the caches of a batch make masks as mlx-lm's Gemma 2 takes them."""
    if module.model_type == "gemma2" and module.layers[0].self_attn.repeats > 1:
        for layer in caches:
            layer.make_mask = _for_grouped_heads(layer.make_mask)


def _for_grouped_heads(make_mask: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Masks (B, 1, 1, L, S) for attention that computes its scores by groups of heads, as mlx-lm's Gemma 2 does; it
    has no place for a mask (B, 1, L, S) of a batch."""
    return lambda *args, **kwargs: make_mask(*args, **kwargs)[:, :, None]


def rotates(layer: Any) -> bool:
    """Whether a cache keeps a window of the newest tokens."""
    return isinstance(layer, import_mlx_lm("models.cache").RotatingKVCache)


def keeps_state(layer: Any) -> bool:
    """Whether a cache keeps arrays of a size of their own, as state-space models do, and no keys and values."""
    return type(layer) is import_mlx_lm("models.cache").ArraysCache


def state_cache(arrays: Sequence[mx.array]) -> Any:
    """A cache with this state."""
    cache = import_mlx_lm("models.cache").ArraysCache(len(arrays))
    cache.cache = list(arrays)
    return cache


def are_of_one_sequence(caches: Sequence[Any]) -> bool:
    """Whether all are plain or rotating caches of one sequence, or keep a state, with something in them."""
    kinds = import_mlx_lm("models.cache")

    def is_of_one(layer: Any) -> bool:
        if keeps_state(layer):
            padded = layer.left_padding is not None or getattr(layer, "lengths", None) is not None
            return not padded and all(part is not None and part.shape[0] == 1 for part in layer.cache)
        return type(layer) in (kinds.KVCache, kinds.RotatingKVCache) and layer.keys is not None

    return all(map(is_of_one, caches))


def in_order(layer: Any) -> tuple[mx.array, mx.array]:
    """Keys and values in a cache of one sequence, in the order of time, without what the next token sees no more."""
    if not rotates(layer):
        return layer.keys[..., : layer.offset, :], layer.values[..., : layer.offset, :]
    keys, values = layer._temporal_order(layer.keys), layer._temporal_order(layer.values)
    gone = max(0, keys.shape[-2] - (layer.max_size - 1))

    def seen(part: mx.array) -> mx.array:
        return mx.concatenate([part[..., : layer.keep, :], part[..., layer.keep + gone :, :]], axis=-2)

    return (seen(keys), seen(values)) if gone else (keys, values)


def hand_back(layer: Any, keys: mx.array, values: mx.array, length: int) -> None:
    """Let a cache of one sequence hold these, in the order of time, after `length` tokens."""
    if rotates(layer):
        layer._idx = keys.shape[-2]
    layer.keys, layer.values, layer.offset = keys, values, length


@dataclass(frozen=True)
class Generation:
    """Where mlx-lm works through prompts."""

    step: Callable[..., Any]
    """generate_step(prompt, model, ...)"""
    speculative: Callable[..., Any]
    """speculative_generate_step(prompt, model, draft_model, ...)"""
    batch: Any
    """The class whose method `prompt(tokens)` reads the prompts of a batch."""


def generation() -> Generation:
    check_borrowed("mlx steer")
    library: Any = importlib.import_module("mlx_lm.generate")
    return Generation(library.generate_step, library.speculative_generate_step, library.PromptProcessingBatch)


Method = Callable[..., Any]


def wrap_evaluator(reading: Callable[[Method], Method], scoring: Callable[[Method], Method]) -> Callable[[], None]:
    """Wrap two methods of mlx-lm's evaluator, where somebody has imported it (which needs lm-eval).

    Args:
        reading: wraps method(self, prompt), which runs a context.
        scoring: wraps method(self, inputs), which runs what is scored after it.

    Returns:
        What puts the methods back.
    """
    if "mlx_lm.evaluate" not in sys.modules:
        return lambda: None
    check_borrowed("mlx evaluator")
    evaluator: Any = sys.modules["mlx_lm.evaluate"].MLXLM
    read, score = evaluator._process_prompt, evaluator._score_fn
    evaluator._process_prompt, evaluator._score_fn = reading(read), scoring(score)

    def put_back() -> None:
        evaluator._process_prompt, evaluator._score_fn = read, score

    return put_back


def evaluated(evaluator: Any) -> nn.Module:
    """The module that an evaluator runs."""
    module: nn.Module = evaluator._model
    return module


def load_lazily(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's own model of a folder, its weights not read yet, and its config."""
    check_borrowed("convert")
    from mlx_lm.utils import load_model

    module, config = load_model(folder, lazy=True)
    return module, config


def quantised_by(module: nn.Module) -> Callable[[str, nn.Module], bool | dict[str, Any]] | None:
    """How the model wants its part of a path quantised, where it has wishes."""
    wanted: Callable[[str, nn.Module], bool | dict[str, Any]] | None = getattr(module, "quant_predicate", None)
    return wanted


def may_be_cast(module: nn.Module, name: str) -> bool:
    """Whether the weight of this name may be cast to a narrower dtype."""
    return bool(getattr(module, "cast_predicate", lambda _: True)(name))


@contextmanager
def _stand_in() -> Iterator[None]:
    """An empty package that knows only where mlx_lm's files are."""
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None:
        raise InputError("mlx-lm is not installed: pip install mlx-lm")
    package = ModuleType("mlx_lm")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["mlx_lm"] = package
    try:
        yield
    finally:
        del sys.modules["mlx_lm"]
        if not any(isinstance(finder, _RealPackage) for finder in sys.meta_path):
            sys.meta_path.insert(0, _RealPackage())


class _RealPackage(MetaPathFinder, Loader):
    """Finds the real mlx_lm once, and gives it the submodules that were imported before it as attributes."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "mlx_lm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            self._loader = spec.loader
            spec.loader = self
        return spec

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        for name, submodule in list(sys.modules.items()):
            parent, _, child = name.rpartition(".")
            if parent == "mlx_lm":
                setattr(module, child, submodule)
        self._loader.exec_module(module)
