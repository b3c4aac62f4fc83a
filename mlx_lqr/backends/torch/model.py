"""The torch backend: transformers' models on CUDA or the CPU, recorded, linearised, steered and decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.func import jvp, vjp

from mlx_lqr.backends.batching import Stretches, in_batches, padded
from mlx_lqr.backends.borrowed import check_borrowed
from mlx_lqr.backends.checkpoint.config import check_rolling, context_of, model_config
from mlx_lqr.backends.checkpoint.model_folder import read_config
from mlx_lqr.backends.fingerprint import fingerprint_of
from mlx_lqr.backends.hooks import BlockCall, LawHooks
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
from mlx_lqr.backends.torch.algebra import TorchAlgebra
from mlx_lqr.backends.torch.attention import WholePrompts, attending
from mlx_lqr.backends.torch.blocks import check_parts, hooked, output_projection, refuse_hooked
from mlx_lqr.backends.torch.decoder import TorchDecoder, TorchTrace, energy
from mlx_lqr.backends.torch.generate import Positions, announcing_prompts
from mlx_lqr.backends.torch.load import check_family, chosen_device, load_module, memory_for
from mlx_lqr.errors import InputError

_SHORTER = "give shorter prompts, load the model with dtype bfloat16, or use device cpu"
_LINEARISE = "load the model with dtype bfloat16, use the feature cost, or device cpu; what is stored so far stays"


def load(folder: Path, name: str, dtype: str | None = None, device: str | None = None) -> TorchModel:
    """The model in a folder of config.json, safetensors and tokenizer files.

    Raises:
        InputError: unsupported architecture, a device that is not there or too small, or files that are missing,
            damaged or do not fit together.
    """
    chosen = chosen_device(device)
    config = read_config(folder)
    meaning = model_config(config)
    with memory_for("the model", "load it with dtype bfloat16, or on device cpu"):
        module = load_module(folder, config, meaning, dtype, chosen)
    model = TorchModel(module, name, Tokenizer(folder, config))
    model.context_length, model.rolls = meaning.context_length, meaning.rolls
    return model


class TorchModel:
    """A transformers model for causal language modelling behind the `Model` protocol (see base.py)."""

    backend = "torch"

    def __init__(self, module: Any, name: str, tokenizer: Tokenizer | None = None) -> None:
        check_borrowed("torch")
        check_family(str(module.config.model_type))
        check_parts(module)
        self.module = module
        self.name = name
        self._tokenizer = tokenizer
        self.blocks: Sequence[torch.nn.Module] = module.base_model.layers
        self.num_layers = len(self.blocks)
        self.hidden_size = int(module.config.hidden_size)
        self.vocab_size = int(module.config.vocab_size)
        self.context_length, self.rolls = context_of(vars(module.config))

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise InputError("this model came without its tokenizer: use mlx_lqr.load, or give token ids")
        return self._tokenizer

    @property
    def algebra(self) -> TorchAlgebra | None:
        """A GPU's, where the model is on one; on the CPU NumPy is as fast."""
        return TorchAlgebra(self._device) if self._device.type == "cuda" else None

    @cached_property
    def fingerprint(self) -> str:
        norms = (
            (f"{k}.{name}", weight.detach().to(torch.bfloat16).cpu().view(torch.int16))
            for k, block in enumerate(self.blocks)
            for name, weight in block.named_parameters()
            if name.endswith("norm.weight")
        )
        return fingerprint_of(self, ((name, weight.numpy().tobytes()) for name, weight in norms))

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

    @torch.no_grad()
    @memory_for("the activations", _SHORTER)
    def _residuals_of_batch(self, prompts: list[Sequence[int]], law: Law | None, steer_all: bool) -> Float32:
        """(B, T + 1, d)"""
        restart(law)
        tokens, rows, last = self._padded(prompts)
        steering = self._from_positions(law, 0 if steer_all else last[:, None], tokens)
        recorded: list[torch.Tensor] = []

        def record(k: int, z: torch.Tensor, call: BlockCall) -> torch.Tensor:
            output = steering.block(k, z, call)
            recorded.append(z[rows, last])
            if k == self.num_layers - 1:
                recorded.append(output[rows, last])
            return output

        with hooked(self.blocks, record, range(self.num_layers), steering):
            self._whole(tokens, self.module.base_model)
        found: Float32 = torch.stack(recorded, dim=1).float().cpu().numpy()
        if (row := first_overflow(found)) is not None:
            raise self.decoder(law).overflow(prompts[row], 0 if steer_all else len(prompts[row]) - 1)
        return found

    def head_outputs(self, prompts: Sequence[Sequence[int]], *, progress: Progress | None = None) -> Float32:
        return in_batches(prompts, self._head_outputs_of_batch, progress)

    @torch.no_grad()
    @memory_for("the activations", _SHORTER)
    def _head_outputs_of_batch(self, prompts: list[Sequence[int]]) -> Float32:
        """(B, T, heads, head_dim)"""
        tokens, rows, last = self._padded(prompts)
        recorded: list[torch.Tensor] = []

        def record(k: int, heads: torch.Tensor, call: BlockCall) -> torch.Tensor:
            recorded.append(heads[rows, last])
            return call(heads)

        with hooked([output_projection(block) for block in self.blocks], record, range(self.num_layers)):
            self._whole(tokens, self.module.base_model)
        stacked = torch.stack(recorded, dim=1).float().cpu().numpy()
        if (row := first_overflow(stacked)) is not None:
            raise self.decoder().overflow(prompts[row], len(prompts[row]))
        return stacked.reshape(*stacked.shape[:2], int(self.module.config.num_attention_heads), -1)

    @torch.no_grad()
    def projected(self, layer: int, heads: Float32) -> Float32:
        projection = output_projection(self.blocks[layer])
        rows = self._array(np.vstack([heads, np.zeros_like(heads[:1])]))  # zero gives the bias, whatever the module
        outputs: np.ndarray = projection(rows).float().cpu().numpy()
        return outputs[:-1] - outputs[-1]

    def logits(self, tokens: Sequence[int], *, law: Law | None = None, steer_all: bool = False) -> Float32:
        decoder = self.decoder(law)
        decoder.fill([tokens[:-1]], steered=steer_all)
        logits = decoder.step(tokens[-1:])
        if OVERFLOWED in decoder.sample(logits).tolist():
            raise self.decoder(law).overflow(tokens, 0 if steer_all else len(tokens) - 1)
        return logits[0].float().cpu().numpy()

    @torch.no_grad()
    @memory_for("the log-probabilities", _SHORTER)
    def log_probabilities(
        self, pairs: Sequence[Continued], *, law: Law | None = None, steer_all: bool = False
    ) -> list[Float32]:
        found = [np.empty(0, np.float32)] * len(pairs)
        for i, logits in self._along([(prompt, tokens[:-1]) for prompt, tokens in pairs], law, steer_all):
            chosen = torch.log_softmax(logits, dim=-1).gather(-1, self._tensor(list(pairs[i][1]))[:, None])
            found[i] = chosen[:, 0].cpu().numpy()
        return found

    @torch.no_grad()
    @memory_for("the logits", _SHORTER)
    def logits_along(
        self, pairs: Sequence[Continued], *, law: Law | None = None, steer_all: bool = False
    ) -> list[Float32]:
        found = {i: logits.cpu().numpy() for i, logits in self._along(pairs, law, steer_all)}
        return [found[i] for i in range(len(pairs))]

    def _along(
        self, pairs: Sequence[Continued], law: Law | None, steer_all: bool
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The number of each pair, and its logits (1 + n, V) in float32."""
        placed = self.place(law)
        for batch, asked in Stretches.batches(self, pairs):
            if isinstance(law, CarryingLaw) and law.acts:
                steps = torch.stack(list(asked.steps(partial(self.decoder, law))), dim=1).float()
                yield from (
                    (i, steps[row, :count]) for row, (i, count) in enumerate(zip(batch, asked.counts, strict=True))
                )
                continue
            tokens, _, _ = self._padded(asked.sequences)
            rows, positions = self._tensor(asked.rows), self._tensor(asked.positions)
            steering = self._from_positions(placed, 0 if steer_all else self._tensor(asked.first)[:, None], tokens)

            energies: list[torch.Tensor] = []

            def gather(
                _: int, z: torch.Tensor, call: BlockCall, at: Any = (rows, positions), energies: Any = energies
            ) -> torch.Tensor:
                energies.append(energy(z[at]))
                return call(z[at][None])  # the head is a large matrix, and few positions are asked for

            layers = placed.layers if placed is not None else ()
            norm = self.module.base_model.norm
            with hooked([norm], gather, [0]), hooked(self.blocks, steering.block, layers, steering):
                logits = self._whole(tokens, self.module).logits[0].float()
            spoiled = (logits * 0).sum(dim=-1) + energies[0] * 0  # see TorchDecoder.sample
            asked.check((spoiled == 0).tolist(), partial(self.decoder, law), steer_all=steer_all)
            yield from zip(batch, logits.split(asked.counts), strict=True)

    def _whole(self, tokens: torch.Tensor, module: Any) -> Any:
        """What the model, or a part of it, makes of tokens (B, L) in one pass without a cache."""
        options: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self._device),  # see TorchDecoder
            "position_ids": torch.arange(tokens.shape[1], device=self._device)[None],
            "use_cache": False,
        }
        with attending(self.module.config, WholePrompts(tokens.shape[1], self._device)):
            return module(**options)

    def trace(self, tokens: Sequence[int]) -> TorchTrace:
        decoder = self.decoder()
        decoder.fill([tokens[:-1]], steered=False)
        trace = decoder.trace(tokens[-1])
        if first_overflow(trace.residual) is not None:
            raise self.decoder().overflow(tokens, len(tokens))
        return trace

    def block(self, trace: TorchTrace, layer: int, z: Float32) -> Float32:
        rows = torch.tensor(z, dtype=torch.float32, device=self._device)
        return self._gathered(layer, len(z), trace.blocks[layer].values(rows))

    def jacobian(self, trace: TorchTrace, layer: int) -> Float32:
        z = torch.tensor(trace.residual[layer], device=self._device)
        return self._gathered(layer, self.hidden_size, trace.blocks[layer].jacobian_columns(z)).T

    def jvp(self, trace: TorchTrace, layer: int, tangents: Float32) -> Float32:
        return self._differentiate(jvp, trace, layer, tangents)

    def vjp(self, trace: TorchTrace, layer: int, cotangents: Float32) -> Float32:
        return self._differentiate(vjp, trace, layer, cotangents)

    def _differentiate(self, product: Any, trace: TorchTrace, layer: int, directions: Float32) -> Float32:
        z = torch.tensor(trace.residual[layer], device=self._device)
        rows = torch.tensor(directions, dtype=torch.float32, device=self._device)
        return self._gathered(layer, len(directions), trace.blocks[layer].products(product, z, rows))

    @torch.no_grad()
    @memory_for("the derivatives", _LINEARISE)
    def _gathered(self, layer: int, count: int, parts: Iterator[torch.Tensor]) -> Float32:
        """A block's values or derivatives (n, d), computed as they are taken, in one array (count, d)."""
        refuse_hooked(self.blocks[layer])
        result = np.empty((count, self.hidden_size), np.float32)
        done = 0
        for part in parts:
            result[done : done + len(part)] = part.detach().cpu().numpy()
            done += len(part)
        return result

    def decoder(self, law: Law | None = None, sampling: Sampling = GREEDY, *, rolling: bool = False) -> TorchDecoder:
        refuse_hooked(self.blocks[0])
        check_rolling(self.rolls, rolling)
        return TorchDecoder(self.module, self.place, law, sampling, self.context_length if rolling else None)

    @contextmanager
    def steer(self, law: Law, *, steer_all: bool) -> Iterator[None]:
        placed = self.place(law)
        assert placed is not None
        refusals: list[InputError] = []
        positions = Positions(steer_all, refusals)
        steering = LawHooks.beyond(placed, lambda: positions.first, torch.cat, torch.where)

        def hook(k: int, z: torch.Tensor, call: BlockCall) -> torch.Tensor:
            output = steering.block(k, z, call)
            if k == self.num_layers - 1:
                positions.end(output)
            return output

        layers = sorted({0, self.num_layers - 1, *placed.layers})  # the first one too, which tells our own functions
        announced = announcing_prompts(self.module, positions, refusals)
        with announced, hooked(self.blocks, hook, layers, steering):
            yield

    def place(self, law: Law | None) -> Law | None:
        """The law with its arrays on the model's device, in the dtype of the residual stream."""
        if law is None:
            return None
        return law.place(self._array, _add_product, renew=lambda old, values: old.copy_(self._array(values)))

    def _array(self, values: np.ndarray) -> torch.Tensor:
        return torch.tensor(values, device=self._device).to(self._dtype)

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (B, L) as `padded` makes them, the rows' numbers (B,) and where each prompt's last token is (B,)."""
        tokens, last = padded(prompts)
        return self._tensor(tokens), torch.arange(len(prompts), device=self._device), self._tensor(last)

    def _from_positions(self, law: Law | None, first: torch.Tensor | int, tokens: torch.Tensor) -> LawHooks:
        """The law from positions `first` (B, 1) of tokens (B, L) on."""
        positions = torch.arange(tokens.shape[1], device=self._device)[None]
        return LawHooks.at(law, (positions >= first)[..., None], torch.where)

    def _tensor(self, numbers: Any) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._device)

    @property
    def _device(self) -> torch.device:
        return self.module.device

    @cached_property
    def _dtype(self) -> torch.dtype:
        """The dtype of the residual stream: that of the norms, which are never packed."""
        parameters = self.blocks[0].named_parameters()
        return next(weight.dtype for name, weight in parameters if name.endswith("norm.weight"))


def _add_product(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """c + a @ b in one operation, for any number of leading dimensions of a and as many, or none, of c."""
    product = torch.addmm(c.reshape(-1, c.shape[-1]), a.reshape(-1, a.shape[-1]), b)
    return product.view(*a.shape[:-1], b.shape[-1])
