"""The MLX backend: mlx-lm's models on Metal or the CPU, recorded, linearised, steered and decoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_lqr import launched
from mlx_lqr.backends import blas
from mlx_lqr.backends.batching import common_beginning
from mlx_lqr.backends.borrowed import check_borrowed
from mlx_lqr.backends.checkpoint.adapter import Adapter
from mlx_lqr.backends.checkpoint.config import model_config
from mlx_lqr.backends.checkpoint.model_folder import read_config
from mlx_lqr.backends.hooked_model import HookedModel
from mlx_lqr.backends.measurement import Measurement
from mlx_lqr.backends.mlx.blocks import TANGENTS, differentiable
from mlx_lqr.backends.mlx.copying import arrays_in, copied
from mlx_lqr.backends.mlx.decoder import MLXDecoder, MLXTrace
from mlx_lqr.backends.mlx.device import on_gpu
from mlx_lqr.backends.mlx.expansion import block_jacobian
from mlx_lqr.backends.mlx.framework import MLXFramework
from mlx_lqr.backends.mlx.gates import Gates
from mlx_lqr.backends.mlx.generate import Positions, announcing_prompts
from mlx_lqr.backends.mlx.layout import layout_of
from mlx_lqr.backends.mlx.library import is_measured, new_caches
from mlx_lqr.backends.mlx.load import check_computed, load_module
from mlx_lqr.backends.mlx.measurement import Measured
from mlx_lqr.backends.mlx.sizes import sizes_of
from mlx_lqr.backends.mlx.step import CompiledStep
from mlx_lqr.backends.protocol import Float32, Law, Sampling
from mlx_lqr.backends.text.tokenizer import Tokenizer


def load(
    folder: Path, name: str, dtype: str | None = None, adapter: Adapter | None = None, pipeline: bool = False
) -> MLXModel:
    """The model in a folder of config.json, safetensors and tokenizer files, with an adapter.

    Under `mlx.launch` it is spread over all processes, in a pipeline if wanted.

    Raises:
        InputError: unsupported architecture, files that are missing, damaged or do not fit together, or an adapter of
            another model.
    """
    config = read_config(folder)
    if not on_gpu():
        blas.warn_if_slow()
    family = str(config["model_type"])
    if pipeline or launched.count() > 1:
        from mlx_lqr.backends.mlx.spread_model import load_spread

        return load_spread(folder, config, name, dtype, adapter, pipeline=pipeline)
    if is_measured(family):
        from mlx_lqr.backends.mlx.measured_model import load_measured

        return load_measured(folder, config, name, dtype, adapter)
    meaning = model_config(config)
    module = load_module(folder, config, meaning, dtype, adapter)
    model = MLXModel(module, name, Tokenizer(folder, config))
    model.context_length, model.rolls = meaning.context_length, meaning.rolls
    model.adapter = adapter
    return model


def norms_of(blocks: Sequence[nn.Module]) -> Iterator[tuple[str, bytes]]:
    """What `HookedModel` knows a model of the families on the list by."""
    for name, weight in tree_flatten(list(blocks)):
        if name.endswith("norm.weight"):
            yield name, in_bfloat16(weight)


def in_bfloat16(weight: mx.array) -> bytes:
    return np.asarray(weight.astype(mx.bfloat16).view(mx.uint16)).tobytes()


class MLXModel(HookedModel):
    """An mlx-lm module behind the `Model` protocol."""

    backend = "mlx"
    algebra = None  # MLX has no float64 on a GPU

    def __init__(self, module: nn.Module, name: str, tokenizer: Tokenizer | None = None) -> None:
        check_borrowed("mlx")
        super().__init__(module, module.layers, vars(module.args), name, tokenizer)
        self.family = str(module.args.model_type)
        self._framework: MLXFramework = MLXFramework.of(self.blocks[0])
        check_computed(module, self._dtype)

    def _norms(self) -> Iterable[tuple[str, bytes]]:
        return norms_of(self.blocks)

    def _weights(self) -> tuple[int, int, str]:
        return sizes_of(self.module)

    def measure(self) -> Measurement:
        """See `Differentiable`."""
        with self._computing("the derivatives"):
            layout = layout_of(self.module, lambda: new_caches(self.module))
            measured = Measured(self.module, layout)
            result = measured.all()
            return replace(result, jacobian=max(result.jacobian, measured.error_of(self)))

    @property
    def _final_norm(self) -> nn.Module:
        norm: nn.Module = self.module.model.norm
        return norm

    _shares = True

    def _past(self, beginnings: Sequence[Sequence[int]], rows: Sequence[int], known: list[Any]) -> Any:
        if len(beginnings) == 1:
            return copied(self._read_once(tuple(beginnings[0]), known), rows=len(rows))
        if known[1:] and known[1][0] == beginnings:
            return copied(known[1][1], rows=rows)
        count = common_beginning(beginnings, len(beginnings[0]) - 1)
        caches = self._past([beginnings[0][:count]], [0] * len(beginnings), known) if count else new_caches(self.module)
        own = self._read([own[count:] for own in beginnings], caches)
        if known:
            known[1:] = [(beginnings, own)]
        return copied(own, rows=rows)

    def _read_once(self, beginning: tuple[int, ...], known: list[Any]) -> Any:
        """The caches after a beginning, read after the known one if it begins with that; not to be used up."""
        read, caches = known[0] if known else ((), None)
        if beginning == read:
            return caches
        goes_on = bool(read) and beginning[: len(read)] == read
        before = copied(caches) if goes_on else new_caches(self.module)
        own = self._read([beginning[len(read) if goes_on else 0 :]], before)
        if not known:
            known.append((beginning, own))
        return own

    def _read(self, tokens: Sequence[Sequence[int]], caches: Any) -> Any:
        """The caches after tokens (B, L) too."""
        self._run(mx.array([list(own) for own in tokens]), caches)  # but for the head
        self._framework.compute(list(arrays_in(caches)))
        return caches

    def _run_blocks(self, tokens: mx.array, past: Any = None) -> None:
        self._run(tokens, past)  # but for the head

    def _run(self, tokens: mx.array, past: Any = None) -> mx.array:
        with self._gates.quick(tokens):
            logits: mx.array = self.module(tokens, cache=past)
        return logits

    def block(self, trace: MLXTrace, layer: int, s: Float32) -> Float32:
        result = np.empty(s.shape, np.float32)
        with self._computing("the derivatives"), differentiable(self.blocks[layer]):
            run = mx.vmap(lambda row: trace.calls[layer](row[None, None])[0, 0])
            for start in range(0, len(s), TANGENTS):
                rows = slice(start, start + TANGENTS)
                result[rows] = np.asarray(run(mx.array(s[rows], mx.float32)))
        return result

    def jacobian(self, trace: MLXTrace, layer: int) -> Float32:
        block = self.blocks[layer]
        with self._computing("the derivatives"), differentiable(block):
            return block_jacobian(block, trace.calls[layer], mx.array(trace.residual[layer]))

    def jvp(self, trace: MLXTrace, layer: int, tangents: Float32) -> Float32:
        return self._differentiate(mx.jvp, trace, layer, tangents)

    def vjp(self, trace: MLXTrace, layer: int, cotangents: Float32) -> Float32:
        return self._differentiate(mx.vjp, trace, layer, cotangents)

    def _differentiate(self, product: Any, trace: MLXTrace, layer: int, directions: Float32) -> Float32:
        """`product` (mx.jvp or mx.vjp) of a block at the trace's last token, for each row of directions (n, d)."""
        z = mx.array(trace.residual[layer])

        def block(z: mx.array) -> mx.array:
            return trace.calls[layer](z[None, None])[0, 0]

        def along(direction: mx.array) -> mx.array:
            return product(block, (z,), (direction,))[1][0]

        result = np.empty(directions.shape, np.float32)
        with self._computing("the derivatives"), differentiable(self.blocks[layer]):
            for start in range(0, len(directions), TANGENTS):
                rows = slice(start, start + TANGENTS)
                result[rows] = np.asarray(mx.vmap(along)(mx.array(directions[rows], mx.float32)))
        return result

    def _new_decoder(self, law: Law | None, sampling: Sampling, window: int | None) -> MLXDecoder:
        return MLXDecoder(
            self.module,
            self._framework,
            self.blocks,
            self.vocab_size,
            law,
            sampling,
            window,
            self._compiled,
            self._gates,
        )

    @contextmanager
    def _others_calls(self, *, steer_all: bool) -> Iterator[Positions]:
        positions = Positions(steer_all)
        with announcing_prompts(self.module, positions):
            yield positions

    def _placed_for_others(self, law: Law) -> Law:
        def computed(values: np.ndarray) -> mx.array:
            placed = self._framework.floats(values)
            mx.eval(placed)  # mlx_lm's server runs in a thread of its own, which cannot compute what this one left lazy
            return placed

        return law.to(computed, self._framework.add_product)

    @cached_property
    def _gates(self) -> Gates:
        return Gates(self.blocks, self._dtype, self.hidden_size)

    @cached_property
    def _compiled(self) -> CompiledStep | None:
        """On the CPU alone, where it has been measured."""
        return None if on_gpu() else CompiledStep(self.module)

    @property
    def _dtype(self) -> mx.Dtype:
        return self._framework.dtype
