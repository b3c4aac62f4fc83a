"""A model of any architecture that transformers has, accepted because it was measured (`measurement.py`).

Nothing here knows a family: transformers builds the model and runs it with caches and attention of its own, sizes are
those of arrays that come out, and derivatives are of blocks as functions (`frozen.py`). Families on the list go another
way, which is faster.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mlx_lqr.backends.borrowed import check_borrowed
from mlx_lqr.backends.checkpoint.adapter import Adapter
from mlx_lqr.backends.hooked_model import HookedModel
from mlx_lqr.backends.measured import MeasuredRecorder, layout_or_refusal, sizes_of
from mlx_lqr.backends.protocol import Float32, Law, Sampling
from mlx_lqr.backends.text.tokenizer import Tokenizer
from mlx_lqr.backends.torch.framework import TorchFramework, memory_for
from mlx_lqr.backends.torch.layout import Layout, StateHooks, layout_of
from mlx_lqr.backends.torch.load import load_any, quietly
from mlx_lqr.backends.torch.measured_decoder import FrozenTrace, MeasuredDecoder
from mlx_lqr.backends.torch.measurement import Measurement, measured
from mlx_lqr.backends.torch.model import TorchModel
from mlx_lqr.errors import InputError

_SHIFTED = ("qwen3_next", "qwen3_5")
"""Families whose norms are kept on MLX with the 1 that they multiply by in addition to their weight"""
_SHIFTED_NORMS = (".input_layernorm.weight", ".post_attention_layernorm.weight", ".q_norm.weight", ".k_norm.weight")


def load_measured(
    folder: Path, config: dict[str, Any], name: str, dtype: str | None, device: torch.device
) -> MeasuredModel:
    """The model in a folder, its architecture any that transformers has.

    Raises:
        InputError: files that are missing, damaged or do not fit together, or a model that cannot be steered.
    """
    tokenizer = Tokenizer(folder, config)
    if "vision_config" in config or "audio_config" in config:
        line = f"of this {config['model_type']} model only the part for text is used"
        warnings.warn(line, RuntimeWarning, stacklevel=3)
    with memory_for("the model"):
        module = load_any(folder, config, dtype, device)
    model = MeasuredModel(module, name, tokenizer)
    if not model.knows_length:
        line = f"config.json does not say how long the context of this {config['model_type']} model is: it has no end"
        warnings.warn(line, RuntimeWarning, stacklevel=3)
    return model


def refuse_adapter(adapter: Adapter | None, family: str) -> None:
    """Raise `InputError` for an adapter: where it belongs is known of the families on the list alone."""
    if adapter is not None:
        raise InputError(
            f"adapters are not taken for models of the type {family!r}: merge this one into the model with peft"
        )


class MeasuredModel(MeasuredRecorder, TorchModel):
    """A transformers model of any architecture behind the `Model` protocol.

    Raises:
        InputError: it cannot be steered; the line says what was measured.
    """

    def __init__(self, module: Any, name: str, tokenizer: Tokenizer | None = None) -> None:
        check_borrowed("torch")
        self.family = str(module.config.model_type)
        with torch.no_grad(), quietly():
            self.layout: Layout = layout_or_refusal(partial(layout_of, module), self.family)
        if self.layout.vocabulary > (known := module.get_input_embeddings().weight.shape[0]):
            raise InputError(
                f"this {self.family} model says {self.layout.vocabulary} tokens and reads {known}: its config.json is "
                "of another model, download it again"
            )
        sizes = sizes_of(module.config.to_dict(), self.layout.width, self.layout.vocabulary)
        self._knows_heads = sizes["num_attention_heads"] is not None
        self.knows_length = sizes["max_position_embeddings"] is not None
        """Whether the config says how long a context may be; where it does not, there is no end."""
        sizes["num_attention_heads"] = sizes["num_attention_heads"] or 1
        HookedModel.__init__(self, module, self.layout.blocks, sizes, name, tokenizer)
        self._framework = TorchFramework(module, self.layout.dtype, StateHooks.of(self.layout))
        with quietly():
            self.measurement: Measurement = measured(module, self.layout, self.fingerprint, self.family)

    def measure(self) -> Measurement:
        return self.measurement

    def _norms(self) -> Iterable[tuple[str, bytes]]:
        """All vectors of the blocks, which are the same on MLX where both libraries have the same names for them."""
        vectors = []
        for k, block in enumerate(self.blocks):
            for name, weight in block.state_dict().items():
                if weight.ndim == 1 and weight.is_floating_point():
                    kept = weight.detach().float() + self._more_on_mlx(name)
                    rounded = kept.to(torch.bfloat16).cpu().view(torch.int16)
                    vectors.append((f"{k}.{name}", rounded.numpy().tobytes()))
        return self._named(vectors)

    def _more_on_mlx(self, name: str) -> int:
        """What mlx-lm adds to a norm's weight when it loads it, where transformers adds it when it computes."""
        return int(self.family.startswith(_SHIFTED) and f".{name}".endswith(_SHIFTED_NORMS))

    @property
    def _body(self) -> torch.nn.Module:
        return self.layout.body

    def _run_blocks(self, tokens: torch.Tensor, past: None = None) -> None:
        self.layout.call(self.module, tokens, None, last=True)

    def _run(self, tokens: torch.Tensor, past: None = None) -> torch.Tensor:
        return self.layout.call(self.module, tokens, None)[0]

    def _head_widths(self) -> set[int] | None:
        attentions = [getattr(block, "self_attn", None) for block in self.blocks]
        projections = [getattr(attention, "o_proj", None) for attention in attentions]
        widths = {part.in_features for part in projections if isinstance(part, torch.nn.Linear)}
        return widths if all(isinstance(part, torch.nn.Linear) for part in projections) else None

    def block(self, trace: FrozenTrace, layer: int, z: Float32) -> Float32:  # type: ignore[override]
        with self._computing("the derivatives"):
            return trace.blocks[layer].values(z)

    def jacobian(self, trace: FrozenTrace, layer: int) -> Float32:  # type: ignore[override]
        with self._computing("the derivatives"):
            return trace.blocks[layer].jacobian(trace.residual[layer])

    def jvp(self, trace: FrozenTrace, layer: int, tangents: Float32) -> Float32:  # type: ignore[override]
        with self._computing("the derivatives"):
            return trace.blocks[layer].jvp(trace.residual[layer], tangents)

    def vjp(self, trace: FrozenTrace, layer: int, cotangents: Float32) -> Float32:  # type: ignore[override]
        with self._computing("the derivatives"):
            return trace.blocks[layer].vjp(trace.residual[layer], cotangents)

    def _new_decoder(  # type: ignore[override]
        self, law: Law | None, sampling: Sampling, window: int | None
    ) -> MeasuredDecoder:
        return MeasuredDecoder(self.module, self._framework, self.layout, self.measurement, law, sampling, window)
