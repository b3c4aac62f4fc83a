"""A model of any architecture that mlx-lm has, accepted because it was measured (`measurement.py`).

Nothing here knows a family: mlx-lm builds the model from its config.json, sizes are those of arrays that come out, and
derivatives are of blocks as functions (`frozen.py`). Families on the list go another way, which is faster.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlx_lqr.backends.batching import Stretches
from mlx_lqr.backends.borrowed import check_borrowed
from mlx_lqr.backends.checkpoint.adapter import Adapter
from mlx_lqr.backends.checkpoint.model_folder import check_dtype
from mlx_lqr.backends.checkpoint.weight_files import weights_of
from mlx_lqr.backends.hooked_model import HookedModel
from mlx_lqr.backends.hooks import output_projection
from mlx_lqr.backends.measured import MeasuredRecorder, layout_or_refusal, sizes_of, stated_size
from mlx_lqr.backends.mlx.adapter import merge_by_own_names, without_adapter
from mlx_lqr.backends.mlx.blocks import unpacked_shape
from mlx_lqr.backends.mlx.confirmed import confirmed_jacobian
from mlx_lqr.backends.mlx.device import on_gpu
from mlx_lqr.backends.mlx.distributed import Spread
from mlx_lqr.backends.mlx.framework import MLXFramework
from mlx_lqr.backends.mlx.generate import Positions
from mlx_lqr.backends.mlx.layout import Layout, StateHooks, blocks_of, layout_of
from mlx_lqr.backends.mlx.library import load_lazily, may_be_cast, new_caches
from mlx_lqr.backends.mlx.load import DTYPES, as_mlx_lm_reads, check_computed, flattened
from mlx_lqr.backends.mlx.measured_decoder import (
    ON_ONE_MACHINE,
    ConfirmedStep,
    FrozenTrace,
    MeasuredDecoder,
    check_site,
)
from mlx_lqr.backends.mlx.measurement import Measurement, measured
from mlx_lqr.backends.mlx.model import MLXModel, in_bfloat16
from mlx_lqr.backends.protocol import Float32, Kept, Law, Sampling
from mlx_lqr.backends.text.tokenizer import Tokenizer
from mlx_lqr.errors import InputError, first_line


def load_measured(
    folder: Path,
    config: dict[str, Any],
    name: str,
    dtype: str | None,
    adapter: Adapter | None = None,
    spread: Spread | None = None,
) -> MeasuredModel:
    """The model in a folder, its architecture any that mlx-lm has a module for, with an adapter.

    Args:
        spread: over which processes, if over several.

    Raises:
        InputError: files that are missing, damaged or do not fit together, a model that cannot be steered, or an
            adapter of another model.
    """
    check_dtype(dtype)
    tokenizer = Tokenizer(folder, config)
    if "vision_config" in config or "audio_config" in config:
        line = f"of this {config['model_type']} model only the part for text is used"
        warnings.warn(line, RuntimeWarning, stacklevel=3)
    files = weights_of(folder)
    try:
        with as_mlx_lm_reads(folder, flattened(config), files) as view:
            module, _ = load_lazily(view)
        adapter = prepare(module, dtype, adapter, spread)
    except InputError:
        raise
    except Exception as error:  # of any of mlx-lm's modules
        raise InputError(f"mlx-lm cannot load {folder}: {first_line(error)}") from error
    model = MeasuredModel(module, config, name, tokenizer, adapter, spread)
    if not model.knows_length:
        line = f"config.json does not say how long the context of this {config['model_type']} model is: it has no end"
        warnings.warn(line, RuntimeWarning, stacklevel=3)
    return model


def prepare(
    module: nn.Module, dtype: str | None, adapter: Adapter | None, spread: Spread | None = None
) -> Adapter | None:
    """Read the weights of a module that mlx-lm has built, in a dtype and with an adapter.

    Returns:
        The adapter by the module's own names.

    Raises:
        InputError: the adapter is another model's.
    """
    module.eval()
    _cast(module, dtype)
    if spread is not None:
        spread.place(module, blocks_of(module), _norms_of)
    mx.eval(module.parameters())
    return None if adapter is None else merge_by_own_names(module, adapter)


def _norms_of(blocks: Sequence[nn.Module]) -> list[tuple[str, bytes]]:
    return [
        (name, in_bfloat16(weight))
        for name, weight in without_adapter(blocks)
        if isinstance(weight, mx.array) and weight.ndim == 1 and mx.issubdtype(weight.dtype, mx.floating)
    ]


def _check_hidden_tokens(module: nn.Module, vocabulary: int | None, family: str) -> None:
    """Raise `InputError` where a model has numbers of tokens beyond its vocabulary, whose logits it would set.

    MLX does not look whether an assignment is within an array: it writes into other memory.
    """
    numbers = [
        part
        for part in module.values()
        if isinstance(part, mx.array) and part.size and mx.issubdtype(part.dtype, mx.integer)
    ]
    highest = max((int(part.max().item()) for part in numbers), default=-1)
    if vocabulary is not None and highest >= vocabulary:
        raise InputError(
            f"models of the type {family!r} hide tokens up to number {highest}, and config.json gives this one a "
            f"vocabulary of {vocabulary}: use one whose vocabulary has them"
        )


def _cast(module: nn.Module, dtype: str | None) -> None:
    """As `load.cast`, but for what the model wants to keep in float32, and for numbers that are no arrays."""
    if dtype is None and on_gpu():
        return
    wanted = DTYPES[dtype or "float32"]

    def cast(name: str, weight: Any) -> Any:
        if not isinstance(weight, mx.array) or not mx.issubdtype(weight.dtype, mx.floating):
            return weight
        return weight.astype(wanted) if wanted == mx.float32 or may_be_cast(module, name) else weight

    module.update(tree_map_with_path(cast, module.parameters()))


class MeasuredModel(MeasuredRecorder, MLXModel):
    """An mlx-lm module of any architecture behind the `Model` protocol.

    Args:
        config: its config.json.
        adapter: with which it computes.
        spread: over which processes, if over several.

    Raises:
        InputError: it cannot be steered; the line says what was measured.
    """

    def __init__(
        self,
        module: nn.Module,
        config: Mapping[str, Any],
        name: str,
        tokenizer: Tokenizer | None = None,
        adapter: Adapter | None = None,
        spread: Spread | None = None,
    ) -> None:
        check_borrowed("mlx")
        self._spread = spread
        self.family = str(config.get("model_type") or type(module).__module__.rpartition(".")[2])
        _check_hidden_tokens(module, stated_size(config, "vocab_size"), self.family)
        look = partial(layout_of, module, lambda: new_caches(module), spread)
        self.layout: Layout = layout_or_refusal(look, self.family)
        sizes = sizes_of(config, self.layout.width, self.layout.vocabulary)
        self._knows_heads = sizes["num_attention_heads"] is not None
        self.knows_length = sizes["max_position_embeddings"] is not None
        """Whether the config says how long a context may be; where it does not, there is no end."""
        sizes["num_attention_heads"] = sizes["num_attention_heads"] or 1
        HookedModel.__init__(self, module, self.layout.blocks, sizes, name, tokenizer)
        self.adapter = adapter
        framework = MLXFramework if spread is None else spread.framework
        self._framework = framework(self.layout.dtype, StateHooks.of(self.layout))
        check_computed(module, self._dtype)
        self._not_expanded: set[int] = set()
        """Layers whose Jacobian takes the general way, since the faster one was not confirmed"""
        self.measurement: Measurement = measured(module, self.layout, self.fingerprint, self.family)

    def measure(self) -> Measurement:
        return self.measurement

    def _norms(self) -> Iterable[tuple[str, bytes]]:
        return self._named(_norms_of(self.blocks) if self._spread is None else self._spread.norms)

    _shares = False  # not known of caches of any kind

    def _run_blocks(self, tokens: mx.array, past: None = None) -> None:
        self._run(tokens)

    def _run(self, tokens: mx.array, past: None = None) -> mx.array:
        """With caches, as decoding does: some of mlx-lm's models compute something else without."""
        return self.layout.finite(self.module(tokens, cache=new_caches(self.module)))

    def _logits_at(
        self, asked: Stretches, law: Law | None, steer_all: bool, kept: Kept | None
    ) -> tuple[mx.array, mx.array]:
        logits, spoiled = super()._logits_at(asked, law, steer_all, kept)
        return logits, spoiled if self._spread is None else self._spread.first_array(spoiled)

    def place(self, law: Law | None) -> Law | None:
        check_site(law, self.layout)
        return super().place(law)

    @contextmanager
    def _others_calls(self, *, steer_all: bool) -> Iterator[Positions]:
        if self._spread is not None and self._spread.is_pipeline:
            raise InputError("mlx_lm's own functions do not run this pipeline: use mlx_lqr.generate and the like")
        with super()._others_calls(steer_all=steer_all) as positions:
            yield positions

    def _check_heads(self) -> None:
        if self._spread is not None:
            raise InputError(ON_ONE_MACHINE)
        super()._check_heads()

    def _head_widths(self) -> set[int] | None:
        if not all("o_proj" in (getattr(block, "self_attn", None) or {}) for block in self.blocks):
            return None
        return {unpacked_shape(output_projection(block))[-1] for block in self.blocks}

    @property
    def state_size(self) -> int:
        return self.hidden_size + self.measurement.shared

    def block(self, trace: FrozenTrace, layer: int, s: Float32) -> Float32:  # type: ignore[override]
        with self._computing("the derivatives"):
            return trace.blocks[layer].values(s)

    def jacobian(self, trace: FrozenTrace, layer: int) -> Float32:  # type: ignore[override]
        block, state = trace.blocks[layer], trace.state[layer]
        with self._computing("the derivatives"):
            if layer not in self._not_expanded and not self.measurement.shared and self._spread is None:
                if (jacobian := confirmed_jacobian(block, state)) is not None:
                    return jacobian
                self._not_expanded.add(layer)
            return block.jacobian(state)

    def jvp(self, trace: FrozenTrace, layer: int, tangents: Float32) -> Float32:  # type: ignore[override]
        with self._computing("the derivatives"):
            return trace.blocks[layer].jvp(trace.state[layer], tangents)

    def vjp(self, trace: FrozenTrace, layer: int, cotangents: Float32) -> Float32:  # type: ignore[override]
        with self._computing("the derivatives"):
            return trace.blocks[layer].vjp(trace.state[layer], cotangents)

    def _new_decoder(self, law: Law | None, sampling: Sampling, window: int | None) -> MeasuredDecoder:
        step = self._compiled
        return MeasuredDecoder(self.module, self._framework, self.layout, self.measurement, law, sampling, window, step)

    @cached_property
    def _compiled(self) -> ConfirmedStep | None:
        if on_gpu() or self._spread is not None:
            return None
        return ConfirmedStep(self.module, self.layout.blocks, StateHooks.of(self.layout))
