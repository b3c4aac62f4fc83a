"""The MLX backend: mlx-lm's models on Metal or the CPU, recorded, linearised, steered and decoded."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_lqr.backends import blas, mlx_lm_calls
from mlx_lqr.backends.base import GREEDY, Float32, Law, Progress, Sampling
from mlx_lqr.backends.mlx_blocks import TANGENTS, BlockCall, PrefixCache, affine_mlp, differentiable, hooked
from mlx_lqr.backends.mlx_lm_models import import_mlx_lm
from mlx_lqr.backends.mlx_load import load_module, read_config
from mlx_lqr.backends.tokenizer import Tokenizer
from mlx_lqr.errors import InputError

PREFILL_CHUNK = 512
"""Prompt tokens per forward pass while filling the cache."""
BATCH_TOKENS = 512
"""Tokens, padding included, per forward pass over many prompts."""


def load(folder: Path, name: str, dtype: str | None = None) -> MLXModel:
    """The model in a folder of config.json, safetensors and tokenizer files.

    Raises:
        InputError: unsupported architecture, or files that are missing, damaged or do not fit together.
    """
    config = read_config(folder)
    if mx.default_device() == mx.cpu:
        blas.warn_if_slow()
    return MLXModel(load_module(folder, config, dtype), name, Tokenizer(folder, config))


@dataclass(frozen=True)
class MLXTrace:
    """What the Jacobians at a prompt's last token depend on."""

    residual: Float32
    """z_0..z_T: (T + 1, d)"""
    calls: list[BlockCall]
    """Block k as a function of its input z (1, 1, d), everything before the last token frozen."""
    nbytes: int
    """Memory held: the prefix's keys and values, and the residual stream."""


class MLXModel:
    """An mlx-lm module behind the `Model` protocol (see base.py)."""

    def __init__(self, module: nn.Module, name: str, tokenizer: Tokenizer | None = None) -> None:
        self.module = module
        self.name = name
        self._tokenizer = tokenizer
        self.blocks: list[nn.Module] = module.layers
        self.num_layers = len(self.blocks)
        self.hidden_size = int(module.args.hidden_size)
        self.vocab_size = int(module.args.vocab_size)
        self.context_length = int(getattr(module.args, "max_position_embeddings", None) or 1 << 30)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise InputError("this model came without its tokenizer: use mlx_lqr.load, or give token ids")
        return self._tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the sizes and of the blocks' norm weights, rounded to bfloat16, the coarsest dtype in use."""
        digest = hashlib.sha256(f"{self.num_layers} {self.hidden_size} {self.vocab_size}".encode())
        norms = [(k, w) for k, w in tree_flatten(self.blocks) if k.endswith("norm.weight")]
        for _, weight in sorted(norms):
            digest.update(np.asarray(weight.astype(mx.bfloat16).view(mx.uint16)).tobytes())
        return digest.hexdigest()[:16]

    def residuals(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        law: Law | None = None,
        steer_all: bool = False,
        progress: Progress | None = None,
    ) -> Float32:
        result = np.empty((len(prompts), self.num_layers + 1, self.hidden_size), np.float32)
        placed = self._place(law)
        done = 0
        for batch in _batches([len(prompt) for prompt in prompts]):
            stacked = self._residuals_of_batch([prompts[i] for i in batch], placed, steer_all)
            result[batch] = np.asarray(stacked.astype(mx.float32))
            done += len(batch)
            if progress:
                progress("Activations", done, len(prompts))
        return result

    def _residuals_of_batch(self, prompts: list[Sequence[int]], law: Law | None, steer_all: bool) -> mx.array:
        """(B, T + 1, d). Prompts are padded on the right, where causal attention keeps the padding away from every real
        token and each real token keeps its position."""
        lengths = mx.array([len(prompt) for prompt in prompts])
        width = max(len(prompt) for prompt in prompts)
        tokens = mx.array([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
        rows, last = mx.arange(len(prompts)), lengths - 1
        steered = (mx.arange(width)[None] >= (0 if steer_all else last[:, None]))[..., None]
        recorded: list[mx.array] = []

        def record(k: int, z: mx.array, call: BlockCall) -> mx.array:
            output = call(z)
            if law is not None and k in law.layers:
                output = output + mx.where(steered, law(k, z), 0)
            recorded.append(z[rows, last])
            if k == self.num_layers - 1:
                recorded.append(output[rows, last])
            mx.eval(output, recorded)  # block by block, or the intermediates of all blocks are held at once
            return output

        with hooked(self.blocks, record, range(self.num_layers)):
            self.module(tokens)
        return mx.stack(recorded, axis=1)

    def logits(self, tokens: Sequence[int], *, law: Law | None = None, steer_all: bool = False) -> Float32:
        logits = self.decoder(law).prefill(tokens, steer_from=0 if steer_all else len(tokens) - 1)
        return np.asarray(logits.astype(mx.float32))

    def log_probability(
        self, prompt: Sequence[int], continuation: Sequence[int], *, law: Law | None = None, steer_all: bool = False
    ) -> Float32:
        tokens = mx.array([[*prompt, *continuation]])
        unsteered = 0 if steer_all else len(prompt) - 1
        logits = self.forward(tokens[:, :-1], None, self._place(law), unsteered)
        logits = logits[0, len(prompt) - 1 :].astype(mx.float32)
        chosen = mx.take_along_axis(logits, mx.array(continuation)[:, None], axis=-1)[:, 0]
        return np.asarray(chosen - mx.logsumexp(logits, axis=-1))

    def trace(self, tokens: Sequence[int]) -> MLXTrace:
        caches = [PrefixCache() for _ in self.blocks]
        residual: list[mx.array] = []
        calls: list[BlockCall] = []

        def record(k: int, z: mx.array, call: BlockCall) -> mx.array:
            output = call(z)
            residual.append(z[0, -1])
            if k == self.num_layers - 1:
                residual.append(output[0, -1])
            mx.eval(output)  # block by block, as above
            return output

        def note(k: int, z: mx.array, call: BlockCall) -> mx.array:
            calls.append(call)
            return z  # the block itself need not run again

        with hooked(self.blocks, record, range(self.num_layers)):
            self.module(mx.array([tokens]), cache=caches)
        stacked = mx.stack(residual).astype(mx.float32)
        mx.eval(stacked, [(cache.keys, cache.values) for cache in caches])
        frozen = [cache.frozen() for cache in caches]
        with hooked(self.blocks, note, range(self.num_layers)):
            self.module(mx.array([tokens[-1:]]), cache=frozen)
        held = sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)
        return MLXTrace(np.asarray(stacked), calls, held + stacked.nbytes)

    def jacobian(self, trace: MLXTrace, layer: int) -> Float32:
        z = mx.array(trace.residual[layer])[None, None]
        block = self.blocks[layer]
        with differentiable(block), affine_mlp(block, lambda: trace.calls[layer](z)):
            return self.jvp(trace, layer, np.eye(self.hidden_size, dtype=np.float32)).T

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

    def decoder(self, law: Law | None = None, sampling: Sampling = GREEDY) -> MLXDecoder:
        return MLXDecoder(self, self._place(law), sampling)

    @contextmanager
    def steer(self, law: Law, *, steer_all: bool) -> Iterator[None]:
        placed = self._place(law)
        assert placed is not None
        positions = mlx_lm_calls.Positions(steer_all)

        def hook(k: int, z: mx.array, call: BlockCall) -> mx.array:
            if k == 0:
                positions.begin(z.shape[1])
            return _steered(placed, k, z, call(z), positions.unsteered)

        layers = sorted({0, *placed.layers})
        with mlx_lm_calls.announcing_prompts(self.module, positions), hooked(self.blocks, hook, layers):
            yield

    def forward(self, tokens: mx.array, cache: list[Any] | None, law: Law | None, unsteered: int) -> mx.array:
        """Logits (B, L, V) of tokens (B, L); the law acts in this call alone, from position `unsteered` on."""
        if law is None or unsteered >= tokens.shape[1]:
            return self.module(tokens, cache=cache)

        def hook(k: int, z: mx.array, call: BlockCall) -> mx.array:
            return _steered(law, k, z, call(z), unsteered)

        with hooked(self.blocks, hook, law.layers):
            return self.module(tokens, cache=cache)

    def _place(self, law: Law | None) -> Law | None:
        """The law with its arrays in the dtype of the residual stream."""
        return law.place(lambda array: mx.array(array).astype(self._dtype)) if law is not None else None

    @cached_property
    def _dtype(self) -> mx.Dtype:
        """The dtype of the residual stream: that of the norms, which are never packed."""
        parameters = tree_flatten(self.blocks[0].parameters())
        return next(weight.dtype for name, weight in parameters if name.endswith("norm.weight"))


class MLXDecoder:
    """One sequence, in the model's own kinds of caches. Between calls nothing of the model is changed."""

    def __init__(self, model: MLXModel, law: Law | None, sampling: Sampling) -> None:
        self._model = model
        self._law = law
        self._cache: list[Any] = import_mlx_lm("models.cache").make_prompt_cache(model.module)
        self._sampler = _sampler(sampling, model.vocab_size)
        self.position = 0

    def prefill(self, tokens: Sequence[int], *, steer_from: int) -> mx.array:
        # The last token goes alone, so that no other position's logits are ever computed.
        start = 0
        while start < len(tokens) - 1:
            end = min(start + PREFILL_CHUNK, len(tokens) - 1)
            self._run(mx.array([tokens[start:end]]), steer_from - start)
            mx.eval([layer.state for layer in self._cache])
            start = end
        return self._run(mx.array([tokens[start:]]), steer_from - start)

    def step(self, token: mx.array) -> mx.array:
        return self._run(token.reshape(1, 1), 0)

    def sample(self, logits: mx.array) -> mx.array:
        token = self._sampler(logits)
        mx.async_eval(token)
        return token

    def _run(self, tokens: mx.array, unsteered: int) -> mx.array:
        self.position += tokens.shape[1]
        return self._model.forward(tokens, self._cache, self._law, max(0, unsteered))[0, -1]


def _steered(law: Law, k: int, z: mx.array, output: mx.array, unsteered: int) -> mx.array:
    """The block's output plus u_k, from position `unsteered` on."""
    if k not in law.layers or unsteered >= z.shape[1]:
        return output
    if unsteered == 0:
        return output + law(k, z)
    return mx.concatenate([output[:, :unsteered], output[:, unsteered:] + law(k, z[:, unsteered:])], axis=1)


def _sampler(sampling: Sampling, vocab_size: int) -> Callable[[mx.array], mx.array]:
    """Logits (V,) -> a token, with a random state of its own."""
    if sampling.temperature == 0:
        return lambda logits: mx.argmax(logits, axis=-1)
    library = import_mlx_lm("sample_utils")
    filters: list[Callable[[mx.array], mx.array]] = []
    if sampling.top_p < 1:
        filters.append(lambda logprobs: library.apply_top_p(logprobs, sampling.top_p))
    if sampling.min_p > 0:
        filters.append(lambda logprobs: library.apply_min_p(logprobs, sampling.min_p))
    if 0 < sampling.top_k < vocab_size:
        filters.append(lambda logprobs: library.apply_top_k(logprobs, sampling.top_k))
    key = mx.random.key(sampling.seed if sampling.seed is not None else secrets.randbits(32))

    def draw(logits: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        logprobs = (logits - mx.logsumexp(logits))[None].astype(mx.float32)
        for keep in filters:
            logprobs = keep(logprobs)
        return mx.random.categorical(logprobs / sampling.temperature, key=now)[0]

    return draw


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, each within BATCH_TOKENS, padding included."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
