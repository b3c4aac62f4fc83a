"""The torch backend: transformers' models on CUDA or the CPU, recorded, linearised, steered and decoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.func import jvp, vjp

from mlx_lqr.backends.borrowed import check_borrowed
from mlx_lqr.backends.checkpoint.adapter import Adapter
from mlx_lqr.backends.checkpoint.config import model_config
from mlx_lqr.backends.checkpoint.model_folder import FAMILIES, read_config
from mlx_lqr.backends.hooked_model import HookedModel
from mlx_lqr.backends.measurement import Measurement
from mlx_lqr.backends.protocol import Float32, Law, Sampling
from mlx_lqr.backends.text.tokenizer import Tokenizer
from mlx_lqr.backends.torch.algebra import TorchAlgebra
from mlx_lqr.backends.torch.attention import WholePrompts, attending
from mlx_lqr.backends.torch.decoder import TorchDecoder, TorchTrace
from mlx_lqr.backends.torch.framework import TorchFramework, memory_for
from mlx_lqr.backends.torch.generate import Positions, announcing_prompts
from mlx_lqr.backends.torch.layout import layout_of
from mlx_lqr.backends.torch.library import check_parts, knows_model
from mlx_lqr.backends.torch.load import check_family, chosen_device, is_listed, load_module
from mlx_lqr.backends.torch.measurement import Measured
from mlx_lqr.errors import InputError


def load(
    folder: Path, name: str, dtype: str | None = None, device: str | None = None, adapter: Adapter | None = None
) -> TorchModel:
    """The model in a folder of config.json, safetensors and tokenizer files, with an adapter merged into it.

    Raises:
        InputError: unsupported architecture, a device that is not there or too small, files that are missing, damaged
            or do not fit together, or an adapter of another model.
    """
    chosen = chosen_device(device)
    config = read_config(folder)
    family = str(config["model_type"])
    if family not in FAMILIES and knows_model(family):
        from mlx_lqr.backends.torch.measured_model import load_measured, refuse_adapter

        refuse_adapter(adapter, family)
        return load_measured(folder, config, name, dtype, chosen)
    meaning = model_config(config)
    with memory_for("the model"):
        module = load_module(folder, config, meaning, dtype, chosen, adapter)
    model = TorchModel(module, name, Tokenizer(folder, config))
    model.context_length, model.rolls = meaning.context_length, meaning.rolls
    model.adapter = adapter
    return model


def adopt(module: Any) -> TorchModel:
    """A model that transformers has made, wrapped.

    Raises:
        InputError: it cannot be steered.
    """
    family = str(module.config.model_type)
    if is_listed(family):
        return TorchModel(module, family)
    from mlx_lqr.backends.torch.measured_model import MeasuredModel

    return MeasuredModel(module, family)


class TorchModel(HookedModel):
    """A transformers model for causal language modelling behind the `Model` protocol."""

    backend = "torch"

    def __init__(self, module: Any, name: str, tokenizer: Tokenizer | None = None) -> None:
        check_borrowed("torch")
        check_family(str(module.config.model_type))
        check_parts(module)
        super().__init__(module, module.base_model.layers, vars(module.config), name, tokenizer)
        self.family = str(module.config.model_type)
        self._framework: TorchFramework = TorchFramework.of(module, self.blocks[0])

    @property
    def algebra(self) -> TorchAlgebra | None:
        """A GPU's, where the model is on one; on the CPU NumPy is as fast."""
        device = self._framework.device
        return TorchAlgebra(device) if device.type == "cuda" else None

    def _norms(self) -> Iterable[tuple[str, bytes]]:
        for k, block in enumerate(self.blocks):
            for name, weight in block.named_parameters():
                if name.endswith("norm.weight"):
                    rounded = weight.detach().to(torch.bfloat16).cpu().view(torch.int16)
                    yield f"{k}.{name}", rounded.numpy().tobytes()

    def _weights(self) -> tuple[int, int, str]:
        weights = list(self.module.parameters())  # each once, whoever shares it
        return sum(weight.numel() for weight in weights), sum(weight.nbytes for weight in weights), ""

    def measure(self) -> Measurement:
        """See `Differentiable`."""
        with self._computing("the derivatives"):
            measured = Measured(self.module, layout_of(self.module))
            result = measured.all()
            return replace(result, jacobian=max(result.jacobian, measured.error_of(self)))

    @property
    def _body(self) -> torch.nn.Module:
        """What every call of the model goes through, also one that leaves the head out."""
        body: torch.nn.Module = self.module.base_model
        return body

    @property
    def _final_norm(self) -> torch.nn.Module:
        norm: torch.nn.Module = self.module.base_model.norm
        return norm

    def _run_blocks(self, tokens: torch.Tensor, past: None = None) -> None:
        self._whole(tokens, self.module.base_model)

    def _run(self, tokens: torch.Tensor, past: None = None) -> torch.Tensor:
        logits: torch.Tensor = self._whole(tokens, self.module).logits
        return logits

    def _whole(self, tokens: torch.Tensor, module: Any) -> Any:
        """What the model, or a part of it, makes of tokens (B, L) in one pass without a cache."""
        device = self._framework.device
        options: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device),  # see TorchDecoder
            "position_ids": torch.arange(tokens.shape[1], device=device)[None],
            "use_cache": False,
        }
        with attending(self.module.config, WholePrompts(tokens.shape[1], device)):
            return module(**options)

    def block(self, trace: TorchTrace, layer: int, z: Float32) -> Float32:
        rows = torch.tensor(z, dtype=torch.float32, device=self._framework.device)
        return self._gathered(layer, len(z), trace.blocks[layer].values(rows))

    def jacobian(self, trace: TorchTrace, layer: int) -> Float32:
        z = torch.tensor(trace.residual[layer], device=self._framework.device)
        return self._gathered(layer, self.hidden_size, trace.blocks[layer].jacobian_columns(z)).T

    def jvp(self, trace: TorchTrace, layer: int, tangents: Float32) -> Float32:
        return self._differentiate(jvp, trace, layer, tangents)

    def vjp(self, trace: TorchTrace, layer: int, cotangents: Float32) -> Float32:
        return self._differentiate(vjp, trace, layer, cotangents)

    def _differentiate(self, product: Any, trace: TorchTrace, layer: int, directions: Float32) -> Float32:
        z = torch.tensor(trace.residual[layer], device=self._framework.device)
        rows = torch.tensor(directions, dtype=torch.float32, device=self._framework.device)
        return self._gathered(layer, len(directions), trace.blocks[layer].products(product, z, rows))

    def _gathered(self, layer: int, count: int, parts: Iterator[torch.Tensor]) -> Float32:
        """A block's values or derivatives (n, d), computed as they are taken, in one array (count, d)."""
        result = np.empty((count, self.hidden_size), np.float32)
        done = 0
        with self._computing("the derivatives"):
            for part in parts:
                result[done : done + len(part)] = part.detach().cpu().numpy()
                done += len(part)
        return result

    def _new_decoder(self, law: Law | None, sampling: Sampling, window: int | None) -> TorchDecoder:
        return TorchDecoder(self.module, self._framework, law, sampling, window)

    @contextmanager
    def _others_calls(self, *, steer_all: bool) -> Iterator[Positions]:
        refusals: list[InputError] = []
        positions = Positions(steer_all, refusals)
        with announcing_prompts(self.module, self._body, positions, refusals):
            yield positions

    @property
    def _dtype(self) -> torch.dtype:
        return self._framework.dtype
