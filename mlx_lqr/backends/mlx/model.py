"""The MLX backend: mlx-lm's models on Metal or the CPU, recorded, linearised, steered and decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_lqr.backends import blas
from mlx_lqr.backends.batching import Stretches, in_batches, padded
from mlx_lqr.backends.borrowed import check_borrowed
from mlx_lqr.backends.checkpoint.config import check_rolling, context_of, model_config
from mlx_lqr.backends.checkpoint.model_folder import read_config
from mlx_lqr.backends.fingerprint import fingerprint_of
from mlx_lqr.backends.hooks import BlockCall, LawHooks
from mlx_lqr.backends.mlx import mlx_lm_calls
from mlx_lqr.backends.mlx.blocks import TANGENTS, differentiable, hooked, output_projection, refuse_hooked
from mlx_lqr.backends.mlx.decoder import MLXDecoder, MLXTrace
from mlx_lqr.backends.mlx.device import on_gpu
from mlx_lqr.backends.mlx.expansion import block_jacobian
from mlx_lqr.backends.mlx.load import check_computed, load_module
from mlx_lqr.backends.mlx.step import CompiledStep, energy
from mlx_lqr.backends.overflow import first_overflow
from mlx_lqr.backends.protocol import (
    GREEDY,
    OVERFLOWED,
    CarryingLaw,
    Continued,
    Float32,
    Law,
    Progress,
    Sampling,
    restart,
)
from mlx_lqr.backends.text.tokenizer import Tokenizer
from mlx_lqr.errors import InputError


def load(folder: Path, name: str, dtype: str | None = None) -> MLXModel:
    """The model in a folder of config.json, safetensors and tokenizer files.

    Raises:
        InputError: unsupported architecture, or files that are missing, damaged or do not fit together.
    """
    config = read_config(folder)
    if not on_gpu():
        blas.warn_if_slow()
    meaning = model_config(config)
    model = MLXModel(load_module(folder, config, meaning, dtype), name, Tokenizer(folder, config))
    model.context_length, model.rolls = meaning.context_length, meaning.rolls
    return model


class MLXModel:
    """An mlx-lm module behind the `Model` protocol (see base.py)."""

    backend = "mlx"
    algebra = None  # MLX has no float64 on a GPU

    def __init__(self, module: nn.Module, name: str, tokenizer: Tokenizer | None = None) -> None:
        check_borrowed("mlx")
        self.module = module
        self.name = name
        self._tokenizer = tokenizer
        self.blocks: list[nn.Module] = module.layers
        self.num_layers = len(self.blocks)
        self.hidden_size = int(module.args.hidden_size)
        self.vocab_size = int(module.args.vocab_size)
        self.context_length, self.rolls = context_of(vars(module.args))
        check_computed(module, self._dtype)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise InputError("this model came without its tokenizer: use mlx_lqr.load, or give token ids")
        return self._tokenizer

    @cached_property
    def fingerprint(self) -> str:
        norms = ((name, weight) for name, weight in tree_flatten(self.blocks) if name.endswith("norm.weight"))
        rounded = ((name, weight.astype(mx.bfloat16).view(mx.uint16)) for name, weight in norms)
        return fingerprint_of(self, ((name, np.asarray(weight).tobytes()) for name, weight in rounded))

    def residuals(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        law: Law | None = None,
        steer_all: bool = False,
        progress: Progress | None = None,
    ) -> Float32:
        placed = self.place(law)
        return in_batches(prompts, lambda batch: self._residuals_of_batch(batch, placed, steer_all), progress)

    def _residuals_of_batch(self, prompts: list[Sequence[int]], law: Law | None, steer_all: bool) -> Float32:
        """(B, T + 1, d)"""
        restart(law)
        tokens, rows, last = _padded(prompts)
        steering = _from_positions(law, 0 if steer_all else last[:, None], tokens)
        recorded: list[mx.array] = []

        def record(k: int, z: mx.array, call: BlockCall) -> mx.array:
            output = steering.block(k, z, call)
            recorded.append(z[rows, last])
            if k == self.num_layers - 1:
                recorded.append(output[rows, last])
            mx.eval(output, recorded)  # block by block, or the intermediates of all blocks are held at once
            return output

        with hooked(self.blocks, record, range(self.num_layers), steering):
            self.module(tokens)
        found = np.asarray(mx.stack(recorded, axis=1).astype(mx.float32))
        if (row := first_overflow(found)) is not None:
            raise self.decoder(law).overflow(prompts[row], 0 if steer_all else len(prompts[row]) - 1)
        return found

    def head_outputs(self, prompts: Sequence[Sequence[int]], *, progress: Progress | None = None) -> Float32:
        return in_batches(prompts, self._head_outputs_of_batch, progress)

    def _head_outputs_of_batch(self, prompts: list[Sequence[int]]) -> Float32:
        """(B, T, heads, head_dim)"""
        tokens, rows, last = _padded(prompts)
        recorded: list[mx.array] = []

        def record(k: int, heads: mx.array, call: BlockCall) -> mx.array:
            recorded.append(heads[rows, last])
            output = call(heads)
            mx.eval(output, recorded)  # block by block, as above
            return output

        with hooked([output_projection(block) for block in self.blocks], record, range(self.num_layers)):
            self.module(tokens)
        stacked = np.asarray(mx.stack(recorded, axis=1).astype(mx.float32))
        if (row := first_overflow(stacked)) is not None:
            raise self.decoder().overflow(prompts[row], len(prompts[row]))
        return stacked.reshape(*stacked.shape[:2], int(self.module.args.num_attention_heads), -1)

    def projected(self, layer: int, heads: Float32) -> Float32:
        projection = output_projection(self.blocks[layer])
        rows = self._array(np.vstack([heads, np.zeros_like(heads[:1])]))  # zero gives the bias, whatever the module
        outputs = np.asarray(projection(rows).astype(mx.float32))
        return outputs[:-1] - outputs[-1]

    def logits(self, tokens: Sequence[int], *, law: Law | None = None, steer_all: bool = False) -> Float32:
        decoder = self.decoder(law)
        decoder.fill([tokens[:-1]], steered=steer_all)
        logits = decoder.step(tokens[-1:])
        if OVERFLOWED in decoder.sample(logits).tolist():
            raise self.decoder(law).overflow(tokens, 0 if steer_all else len(tokens) - 1)
        return np.asarray(logits[0].astype(mx.float32))

    def log_probabilities(
        self, pairs: Sequence[Continued], *, law: Law | None = None, steer_all: bool = False
    ) -> list[Float32]:
        found = [np.empty(0, np.float32)] * len(pairs)
        for i, logits in self._along([(prompt, tokens[:-1]) for prompt, tokens in pairs], law, steer_all):
            chosen = mx.take_along_axis(logits, mx.array(list(pairs[i][1]))[:, None], axis=-1)[:, 0]
            found[i] = np.asarray(chosen - mx.logsumexp(logits, axis=-1))
        return found

    def logits_along(
        self, pairs: Sequence[Continued], *, law: Law | None = None, steer_all: bool = False
    ) -> list[Float32]:
        found = dict(self._along(pairs, law, steer_all))
        return [np.asarray(found[i]) for i in range(len(pairs))]

    def _along(self, pairs: Sequence[Continued], law: Law | None, steer_all: bool) -> Iterator[tuple[int, mx.array]]:
        """The number of each pair, and its logits (1 + n, V) in float32."""
        placed = self.place(law)
        for batch, asked in Stretches.batches(self, pairs):
            if isinstance(law, CarryingLaw) and law.acts:
                steps = mx.stack(list(asked.steps(partial(self.decoder, law))), axis=1).astype(mx.float32)
                yield from (
                    (i, steps[row, :count]) for row, (i, count) in enumerate(zip(batch, asked.counts, strict=True))
                )
                continue
            tokens, _, _ = _padded(asked.sequences)
            rows, positions = mx.array(asked.rows), mx.array(asked.positions)
            steering = _from_positions(placed, 0 if steer_all else mx.array(asked.first)[:, None], tokens)

            energies: list[mx.array] = []

            def gather(
                _: int, z: mx.array, call: BlockCall, at: Any = (rows, positions), energies: Any = energies
            ) -> mx.array:
                energies.append(energy(z[at]))
                return call(z[at][None])  # the head is a large matrix, and few positions are asked for

            layers = placed.layers if placed is not None else ()
            with hooked([self.module.model.norm], gather, [0]), hooked(self.blocks, steering.block, layers, steering):
                logits = self.module(tokens)[0].astype(mx.float32)
            spoiled = (logits * 0).sum(axis=-1) + energies[0] * 0  # see MLXDecoder.sample
            asked.check((spoiled == 0).tolist(), partial(self.decoder, law), steer_all=steer_all)
            starts = np.cumsum(asked.counts)[:-1].tolist()
            yield from zip(batch, mx.split(logits, starts), strict=True)

    def trace(self, tokens: Sequence[int]) -> MLXTrace:
        trace = self.decoder().trace_prompt(tokens)
        if first_overflow(trace.residual) is not None:
            raise self.decoder().overflow(tokens, len(tokens))
        return trace

    def block(self, trace: MLXTrace, layer: int, z: Float32) -> Float32:
        result = np.empty(z.shape, np.float32)
        with differentiable(self.blocks[layer]):
            run = mx.vmap(lambda row: trace.calls[layer](row[None, None])[0, 0])
            for start in range(0, len(z), TANGENTS):
                rows = slice(start, start + TANGENTS)
                result[rows] = np.asarray(run(mx.array(z[rows], mx.float32)))
        return result

    def jacobian(self, trace: MLXTrace, layer: int) -> Float32:
        block = self.blocks[layer]
        with differentiable(block):
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
        with differentiable(self.blocks[layer]):
            for start in range(0, len(directions), TANGENTS):
                rows = slice(start, start + TANGENTS)
                result[rows] = np.asarray(mx.vmap(along)(mx.array(directions[rows], mx.float32)))
        return result

    def decoder(self, law: Law | None = None, sampling: Sampling = GREEDY, *, rolling: bool = False) -> MLXDecoder:
        refuse_hooked(type(self.blocks[0]))
        check_rolling(self.rolls, rolling)
        window = self.context_length if rolling else None
        return MLXDecoder(self.module, self._array, law, sampling, window, self._compiled)

    @contextmanager
    def steer(self, law: Law, *, steer_all: bool) -> Iterator[None]:
        def evaluated(array: np.ndarray) -> mx.array:
            placed = self._array(array)
            mx.eval(placed)  # mlx_lm's server runs in a thread of its own, which cannot compute what this one left lazy
            return placed

        placed = law.place(evaluated, mx.addmm)
        positions = mlx_lm_calls.Positions(steer_all)
        steering = LawHooks.beyond(placed, lambda: positions.unsteered, mx.concatenate, mx.where)

        def hook(k: int, z: mx.array, call: BlockCall) -> mx.array:
            if k == 0:
                positions.begin(z.shape[1])
            output = steering.block(k, z, call)
            if k == self.num_layers - 1:
                positions.end(output)
            return output

        layers = sorted({0, self.num_layers - 1, *placed.layers})
        with mlx_lm_calls.announcing_prompts(self.module, positions), hooked(self.blocks, hook, layers, steering):
            yield

    def place(self, law: Law | None) -> Law | None:
        """The law with its arrays in the dtype of the residual stream."""
        return law.place(self._array, mx.addmm) if law is not None else None

    def _array(self, values: np.ndarray) -> mx.array:
        return mx.array(values).astype(self._dtype)

    @cached_property
    def _compiled(self) -> CompiledStep | None:
        """On the CPU alone, where it has been measured."""
        return None if on_gpu() else CompiledStep(self.module)

    @cached_property
    def _dtype(self) -> mx.Dtype:
        """The dtype of the residual stream: that of the norms, which are never packed."""
        parameters = tree_flatten(self.blocks[0].parameters())
        return next(weight.dtype for name, weight in parameters if name.endswith("norm.weight"))


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[mx.array, mx.array, mx.array]:
    """Tokens (B, L) as `padded` makes them, the rows' numbers (B,) and where each prompt's last token is (B,)."""
    tokens, last = padded(prompts)
    return mx.array(tokens), mx.arange(len(prompts)), mx.array(last)


def _from_positions(law: Law | None, first: mx.array | int, tokens: mx.array) -> LawHooks:
    """The law from positions `first` (B, 1) of tokens (B, L) on."""
    return LawHooks.at(law, (mx.arange(tokens.shape[1])[None] >= first)[..., None], mx.where)
