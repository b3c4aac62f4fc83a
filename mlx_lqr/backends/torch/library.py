"""transformers as this backend sees it: all that is private in it or has been renamed before, here and nowhere else.

`borrowed.py` lists it and looks whether it is there.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from importlib import metadata
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mlx_lqr.backends.borrowed import changed
from mlx_lqr.backends.hooks import output_projection
from mlx_lqr.errors import InputError

_PARTS = ("config.max_position_embeddings", "base_model.layers", "base_model.norm", "base_model.rotary_emb.rope_type")


def check_parts(module: Any) -> None:
    """Look for the parts of a supported family's model, and the arguments of its blocks, that we know by name.

    Raises:
        InputError: transformers has renamed one of them.
    """
    try:
        for path in _PARTS:
            attrgetter(path)(module)
        block = module.base_model.layers[0]
        output_projection(block)
    except AttributeError as error:
        raise changed("transformers", f"makes a {type(module).__name__} without {error.name}") from error
    first, *others = inspect.signature(type(block).forward).parameters
    if [first, *others[:1]] != ["self", "hidden_states"] or "position_embeddings" not in others:
        raise changed("transformers", f"calls a {type(block).__name__} in another way")


_CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the cache, the newest name first."""


def cache_argument(module: Any) -> str:
    """The name under which the model's forward takes its cache.

    Raises:
        InputError: none that is known.
    """
    parameters = inspect.signature(module.forward).parameters
    for name in _CACHE_NAMES:
        if name in parameters:
            return name
    raise InputError(
        f"{type(module).__name__} of transformers {metadata.version('transformers')} takes its cache under a name that "
        "mlx_lqr does not know: use another version of transformers"
    )


def config_of(family: str, settings: dict[str, Any]) -> Any:
    """transformers' config of a family with these settings."""
    return CONFIG_MAPPING[family](**settings)


def config_from(folder: Path, family: str) -> Any:
    """transformers' config of a family, as it reads the folder's config.json; no code of the folder is run.

    What computes attention and experts is transformers' own choice: other implementations that a config may name are
    packages or come from the hub.
    """
    config = CONFIG_MAPPING[family].from_pretrained(str(folder), local_files_only=True)
    config._attn_implementation = "eager" if config.output_attentions else None
    config._experts_implementation = None
    return config


def model_class(config: Any) -> Any:
    """The class of the model with this config."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def knows_model(family: str) -> bool:
    """Whether there is a model for causal language modelling of this type."""
    return family in CONFIG_MAPPING and CONFIG_MAPPING[family] in MODEL_FOR_CAUSAL_LM_MAPPING


def is_of_transformers(thing: Any) -> bool:
    """Whether it is a cache, or another of transformers' objects that hold tensors and are neither model nor config."""
    if isinstance(thing, (type, Enum, torch.nn.Module, PreTrainedConfig)) or not hasattr(thing, "__dict__"):
        return False
    return type(thing).__module__.startswith("transformers.")


def knows_activation(name: str) -> bool:
    return name in ACT2FN


def register_attention(name: str, attend: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Let configs name a function for attention, and one for the masks of models that are given none."""
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)


@contextmanager
def attention_by(config: Any, name: str) -> Iterator[None]:
    """Inside this context a model with this config attends by the function of this name; afterwards as before."""
    before = config._attn_implementation_internal
    # Not by the property, which walks through the config each time.
    config._attn_implementation_internal = name
    try:
        yield
    finally:
        config._attn_implementation_internal = before


@contextmanager
def dense_experts(config: Any) -> Iterator[None]:
    """Experts of a mixture are gathered and multiplied in one batch, which can be differentiated; afterwards as before.

    transformers' other ways go through the experts one by one, with shapes that depend on the numbers.
    """
    before = config._experts_implementation_internal
    config._experts_implementation_internal = "batched_mm"
    try:
        yield
    finally:
        config._experts_implementation_internal = before


@functools.cache
def paged_cache() -> Any:
    """The class of the cache of `generate_batch`, in which many requests stand in one row."""
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    return PagedAttentionCache


@functools.cache
def request_state() -> Any:
    """The class of the requests of `generate_batch`."""
    from transformers.generation.continuous_batching.requests import RequestState

    return RequestState


def unshared(options: Any) -> Any:
    """Options of `generate_batch` (or None) with which requests share no keys and values, in steps as they are
    written."""
    if options is None:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        options = ContinuousBatchingConfig()
    else:
        options = copy.copy(options)
    options.allow_block_sharing = options.use_cuda_graph = False
    options.varlen_compile_config = options.decode_compile_config = None
    options.default_compile_level = 0
    return options


def is_unshared(manager: Any) -> bool:
    """Whether a manager of `generate_batch` has such options."""
    used = manager.continuous_batching_config
    return not used.allow_block_sharing and not any(used.cuda_graph_booleans) and used.varlen_compile_config is None


def cropped(cache: Any, count: int) -> Any:
    """The cache without its newest `count` tokens, or None where it cannot forget them; it is spent either way."""
    try:
        cache.crop(-count)
    except Exception:  # of any kind of cache, which may have none of it
        return None
    return cache
