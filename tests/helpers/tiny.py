"""Small random models of every supported family, built from mlx-lm's own classes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map_with_path

from mlx_lqr.backends.mlx.library import is_supported, model_classes
from mlx_lqr.backends.mlx.model import MLXModel

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 6},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "phi3": {},
    "olmo2": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}

FAMILY = {family: settings for family, settings in FAMILY.items() if is_supported(family)}  # of the mlx-lm installed
families = pytest.mark.parametrize("family", sorted(FAMILY))


def tiny(family: str, *, seed: int = 0, dtype: mx.Dtype = mx.float32, **changes: Any) -> MLXModel:
    """A model whose random weights, norms included, are large enough for every part to matter."""
    Model, ModelArgs = model_classes(family)
    module = Model(ModelArgs.from_dict({"model_type": family, **COMMON, **FAMILY[family], **changes}))
    mx.random.seed(seed)

    def draw(path: str, weight: mx.array) -> mx.array:
        scale = 0.3 if path.endswith("norm.weight") or weight.ndim == 1 else weight.shape[-1] ** -0.5
        centre = 1.0 if path.endswith("norm.weight") and not family.startswith("gemma") else 0.0
        return centre + scale * mx.random.normal(weight.shape)

    module.update(tree_map_with_path(draw, module.parameters()))
    module.set_dtype(dtype)
    module.eval()
    mx.eval(module.parameters())
    return MLXModel(module, f"tiny-{family}")
