"""A model of any architecture that mlx-lm has, accepted because it was measured (`measurement.py`).

Nothing here knows a family: mlx-lm builds the model from its config.json, sizes are those of arrays that come out, and
derivatives are of blocks as functions (`frozen.py`). Families on the list go another way, which is faster.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path

from mlx_lqr.backends.batching import Stretches
from mlx_lqr.backends.borrowed import check_borrowed
from mlx_lqr.backends.checkpoint.adapter import Adapter
from mlx_lqr.backends.checkpoint.model_folder import check_dtype
from mlx_lqr.backends.checkpoint.weight_files import weights_of
from mlx_lqr.backends.hooked_model import HookedModel
from mlx_lqr.backends.hooks import BlockCall, output_projection
from mlx_lqr.backends.mlx.adapter import merge_by_own_names, without_adapter
from mlx_lqr.backends.mlx.blocks import unpacked_shape
from mlx_lqr.backends.mlx.confirmed import confirmed_jacobian
from mlx_lqr.backends.mlx.device import on_gpu
from mlx_lqr.backends.mlx.framework import MLXFramework
from mlx_lqr.backends.mlx.layout import WITHOUT_HEADS, Layout, NoChainError, StateHooks, layout_of
from mlx_lqr.backends.mlx.library import load_lazily, may_be_cast, new_caches
from mlx_lqr.backends.mlx.load import DTYPES, as_mlx_lm_reads, check_computed, flattened
from mlx_lqr.backends.mlx.measured_decoder import ConfirmedStep, FrozenTrace, MeasuredDecoder
from mlx_lqr.backends.mlx.measurement import Measurement, measured
from mlx_lqr.backends.mlx.model import MLXModel
from mlx_lqr.backends.protocol import Float32, Law, Progress, Sampling
from mlx_lqr.backends.text.tokenizer import Tokenizer
from mlx_lqr.errors import InputError, first_line

_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")
"""The names that families have for how long a context may be."""
_HEADS = ("num_attention_heads", "n_head", "num_heads")


def _size(sizes: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """The first of these sizes that a config says as one number."""
    for name in names:
        value = sizes.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def load_measured(
    folder: Path, config: dict[str, Any], name: str, dtype: str | None, adapter: Adapter | None = None
) -> MeasuredModel:
    """The model in a folder, its architecture any that mlx-lm has a module for, with an adapter.

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
        adapter = prepare(module, dtype, adapter)
    except InputError:
        raise
    except Exception as error:  # of any of mlx-lm's modules
        raise InputError(f"mlx-lm cannot load {folder}: {first_line(error)}") from error
    model = MeasuredModel(module, config, name, tokenizer, adapter)
    if not model.knows_length:
        line = f"config.json does not say how long the context of this {config['model_type']} model is: it has no end"
        warnings.warn(line, RuntimeWarning, stacklevel=3)
    return model


def prepare(module: nn.Module, dtype: str | None, adapter: Adapter | None) -> Adapter | None:
    """Read the weights of a module that mlx-lm has built, in a dtype and with an adapter.

    Returns:
        The adapter by the module's own names.

    Raises:
        InputError: the adapter is another model's.
    """
    module.eval()
    _cast(module, dtype)
    mx.eval(module.parameters())
    return None if adapter is None else merge_by_own_names(module, adapter)


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


class MeasuredModel(MLXModel):
    """An mlx-lm module of any architecture behind the `Model` protocol.

    Args:
        config: its config.json.
        adapter: with which it computes.

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
    ) -> None:
        check_borrowed("mlx")
        self.family = str(config.get("model_type") or type(module).__module__.rpartition(".")[2])
        self.layout = self._layout(module)
        text = config.get("text_config")
        sizes = {**config, **(text if isinstance(text, dict) else {})}
        heads, length = _size(sizes, _HEADS), _size(sizes, _LENGTHS)
        self._knows_heads = heads is not None
        self.knows_length = length is not None
        """Whether the config says how long a context may be; where it does not, there is no end."""
        sizes |= {"hidden_size": self.layout.width, "vocab_size": self.layout.vocabulary}
        sizes |= {"num_attention_heads": heads or 1, "max_position_embeddings": length}
        HookedModel.__init__(self, module, self.layout.blocks, sizes, name, tokenizer)
        self.adapter = adapter
        self._framework = MLXFramework(self.layout.dtype, StateHooks.of(self.layout))
        check_computed(module, self._dtype)
        self._not_expanded: set[int] = set()
        """Layers whose Jacobian takes the general way, since the faster one was not confirmed"""
        self.measurement: Measurement = measured(module, self.layout, self.fingerprint, self.family)

    def _layout(self, module: nn.Module) -> Layout:
        refused = f"models of the type {self.family!r} cannot be steered"
        try:
            return layout_of(module, lambda: new_caches(module))
        except NoChainError as error:
            raise InputError(f"{refused}: {error}; a controller needs blocks that hand on one state") from error
        except InputError:
            raise
        except Exception as error:  # of any of mlx-lm's modules
            raise InputError(f"{refused}: running a few tokens failed ({first_line(error)})") from error

    def _norms(self) -> Iterable[tuple[str, bytes]]:
        norms = [
            (name, np.asarray(weight.astype(mx.bfloat16).view(mx.uint16)).tobytes())
            for name, weight in without_adapter(self.blocks)
            if isinstance(weight, mx.array) and weight.ndim == 1 and mx.issubdtype(weight.dtype, mx.floating)
        ]
        if not norms:
            raise InputError(
                f"models of the type {self.family!r} cannot be steered: their blocks have no norm weights, by which a "
                "controller knows its model; use another model"
            )
        return norms

    def _run_blocks(self, tokens: mx.array) -> None:
        self._run(tokens)

    def _run(self, tokens: mx.array) -> mx.array:
        """With caches, as decoding does: some of mlx-lm's models compute something else without."""
        return self.layout.finite(self.module(tokens, cache=new_caches(self.module)))

    def _logits_at(self, asked: Stretches, law: Law | None, steer_all: bool) -> tuple[mx.array, mx.array]:
        framework, last = self._framework, self.num_layers - 1
        tokens, _, _ = self._padded(asked.sequences)
        at = framework.integers(asked.rows), framework.integers(asked.positions)
        first = 0 if steer_all else framework.integers(asked.first)[:, None]
        steering = self._from_positions(law, first, tokens)
        energies: list[mx.array] = []

        def hook(k: int, z: mx.array, call: BlockCall) -> mx.array:
            output = steering.block(k, z, call)
            if k == last:
                energies.append(framework.energy(output[at]))
            return output

        layers = sorted({*(law.layers if law is not None else ()), last})
        with framework.hooked(self.blocks, hook, layers, steering):
            logits = framework.float32(self._run(tokens)[at])
        return logits, (logits * 0).sum(-1) + energies[0] * 0

    def head_outputs(self, prompts: Sequence[Sequence[int]], *, progress: Progress | None = None) -> Float32:
        self._check_heads()
        return super().head_outputs(prompts, progress=progress)

    def projected(self, layer: int, heads: Float32) -> Float32:
        self._check_heads()
        return super().projected(layer, heads)

    def _check_heads(self) -> None:
        if not all("o_proj" in getattr(block, "self_attn", {}) for block in self.blocks):
            raise InputError(WITHOUT_HEADS)
        widths = {unpacked_shape(output_projection(block))[-1] for block in self.blocks}
        if not self._knows_heads or len(widths) > 1:
            raise InputError(
                f"the attention heads of models of the type {self.family!r} differ by layer, or config.json does not "
                "say how many there are: use a method that acts on whole blocks"
            )

    def block(self, trace: FrozenTrace, layer: int, z: Float32) -> Float32:  # type: ignore[override]
        return trace.blocks[layer].values(z)

    def jacobian(self, trace: FrozenTrace, layer: int) -> Float32:  # type: ignore[override]
        block, z = trace.blocks[layer], trace.residual[layer]
        if layer not in self._not_expanded:
            if (jacobian := confirmed_jacobian(block, z)) is not None:
                return jacobian
            self._not_expanded.add(layer)
        return block.jacobian(z)

    def jvp(self, trace: FrozenTrace, layer: int, tangents: Float32) -> Float32:  # type: ignore[override]
        return trace.blocks[layer].jvp(trace.residual[layer], tangents)

    def vjp(self, trace: FrozenTrace, layer: int, cotangents: Float32) -> Float32:  # type: ignore[override]
        return trace.blocks[layer].vjp(trace.residual[layer], cotangents)

    def _new_decoder(self, law: Law | None, sampling: Sampling, window: int | None) -> MeasuredDecoder:
        step = self._compiled
        return MeasuredDecoder(self.module, self._framework, self.layout, self.measurement, law, sampling, window, step)

    @cached_property
    def _compiled(self) -> ConfirmedStep | None:
        return None if on_gpu() else ConfirmedStep(self.module, self.layout.blocks, StateHooks.of(self.layout))
