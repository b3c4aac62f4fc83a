"""Small random models of families that are on no list, as transformers makes them, and hooked by hand."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
import transformers

from helpers.tiny_tokenizers import NoEnd
from mlx_lqr.backends.torch.measured_model import MeasuredModel

_COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 16}
_DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6}

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("transformer.h", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("gpt_neox.layers", {}),
    "bloom": ("transformer.h", {"n_layer": 4, "n_head": 4}),
    "bart": ("model.decoder.layers", {
        "d_model": 32, "decoder_layers": 4, "encoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
        "is_decoder": True, "forced_eos_token_id": None}),
    "glm4": ("model.layers", {}),
    "lfm2": ("model.layers", {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3}),
    "granitemoehybrid": ("model.layers", _EXPERTS | {
        "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
        "shared_intermediate_size": 16, "position_embedding_type": "nope", "mamba_n_groups": 1}),
    "mamba": ("backbone.layers", {"state_size": 8, "time_step_rank": 4}),
    "qwen3_next": ("model.layers", _EXPERTS | _DELTA | {"shared_expert_intermediate_size": 16}),
    "qwen3_5": ("model.layers", {"text_config": _COMMON | _DELTA}),
    "gpt_oss": ("model.layers", _EXPERTS | _SLIDING),
    "deepseek_v3": ("model.layers", _EXPERTS | {
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8, "head_dim": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1}),
    "gemma3": ("model.language_model.layers", {"text_config": _COMMON | _SLIDING, "vision_config": _VISION}),
    "gemma3n_text": ("model.layers", _SLIDING | {
        "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
        "intermediate_size": [48] * 4, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4}),
}  # fmt: skip
"""Family -> where its blocks are, and what of its config is not as in all."""
STREAMS = ("gemma3n_text",)
"""Families whose state is several streams side by side, so that it is not hooked by hand."""

Hook = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""hook(k, z, output) -> output, for the input z (B, L, d) and the output of block k"""
Push = Callable[[int, torch.Tensor], torch.Tensor]
"""push(k, z) -> z"""


def config_of(family: str, **changes: Any) -> Any:
    nested = "text_config" in SETTINGS[family][1]
    return transformers.CONFIG_MAPPING[family](**({} if nested else _COMMON) | SETTINGS[family][1] | changes)


def module_of(family: str, *, seed: int = 1, **changes: Any) -> Any:
    """transformers' model, whose random weights, norms included, are large enough for every part to matter."""
    torch.manual_seed(seed)
    module = transformers.AutoModelForCausalLM.from_config(config_of(family, **changes)).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        drawn = torch.randn(weight.shape, generator=random)
        weight.data = weight + 0.2 * drawn if weight.ndim == 1 else drawn * weight.shape[-1] ** -0.5
    return module


@functools.cache
def model_of(family: str) -> MeasuredModel:
    return MeasuredModel(module_of(family), f"tiny-{family}", NoEnd())  # type: ignore[arg-type]


@functools.cache
def precise(family: str) -> Any:
    """The same module in float64."""
    module = copy.deepcopy(model_of(family).module).double()
    module.set_experts_implementation("eager")  # the others multiply float32 and less
    return module


@contextmanager
def by_hand(module: Any, family: str, hook: Hook | None = None, push: Push | None = None) -> Iterator[None]:
    """Inside this context the blocks, called with their state first, go through the hooks; nothing of ours is used."""
    handles = []
    for k, block in enumerate(attrgetter(SETTINGS[family][0])(module)):
        inputs: list[torch.Tensor] = []

        def before(_: Any, args: Any, kwargs: Any, k: int = k, inputs: list[torch.Tensor] = inputs) -> Any:
            z = (args or [kwargs["hidden_states"]])[0]
            inputs[:] = [z if push is None else push(k, z)]
            return ((*inputs, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": inputs[0]})

        def after(_: Any, __: Any, output: Any, k: int = k, inputs: list[torch.Tensor] = inputs) -> Any:
            if hook is None:
                return output
            if isinstance(output, torch.Tensor):
                return hook(k, inputs[0], output)
            return (hook(k, inputs[0], output[0]), *output[1:])

        handles += [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
