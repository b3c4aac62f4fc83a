"""Alibaba's Qwen models with experts, and those that mix attention with gated delta rules."""

from __future__ import annotations

from mlx_lqr.convert.architectures.dense import qwen3, rotated_part
from mlx_lqr.convert.architectures.layouts import GATED_DELTA, qkvz
from mlx_lqr.convert.architectures.row import Architecture, Config, Stated, Stored, experts


def _mixture(stated: Stated) -> Config:
    count, used = experts(stated)
    return {
        "num_experts": count,
        "num_experts_per_tok": used,
        "moe_intermediate_size": stated.whole("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _shared(stated: Stated) -> Config:
    return {"shared_expert_intermediate_size": stated.whole("expert_shared_feed_forward_length")}


def _qwen2_moe(stated: Stated, config: Config) -> Config:
    return _mixture(stated) | _shared(stated) | {"norm_topk_prob": False}


def _qwen3_moe(stated: Stated, config: Config) -> Config:
    return qwen3(stated, config) | _mixture(stated) | {"norm_topk_prob": True}


def _gated_delta(stated: Stated, config: Config) -> Config:
    heads = stated.whole("ssm.time_step_rank")
    interval = stated.whole("full_attention_interval", 4)
    recurrent = [bool((index + 1) % interval) for index in range(stated.layers)]
    key = "attention.recurrent_layers"
    if stated.get(key) is not None and [bool(item) for item in stated.each(key)] != recurrent:
        raise stated.refuse("has an irregular order of layers with attention: mlx-lm cannot do that")
    return {
        "linear_num_value_heads": heads,
        "linear_num_key_heads": stated.whole("ssm.group_count"),
        "linear_key_head_dim": stated.whole("ssm.state_size"),
        "linear_value_head_dim": stated.whole("ssm.inner_size") // max(heads, 1),
        "linear_conv_kernel_dim": stated.whole("ssm.conv_kernel"),
        "full_attention_interval": interval,
        "attention_bias": False,
        "partial_rotary_factor": rotated_part(stated, config),
    }


def _qwen3_next(stated: Stated, config: Config) -> Config:
    return _gated_delta(stated, config) | _mixture(stated) | _shared(stated) | {"norm_topk_prob": True}


def _qwen3_5(stated: Stated, config: Config) -> Config:
    if config["rope_scaling"] is not None:
        raise stated.refuse("scales RoPE, which mlx-lm's qwen3_5 does not do")
    settings = _gated_delta(stated, config)
    rope = {
        "rope_type": "default",
        "rope_theta": config["rope_theta"],
        "partial_rotary_factor": settings["partial_rotary_factor"],
    }
    return settings | {"rope_parameters": rope}


def _qwen3_5_moe(stated: Stated, config: Config) -> Config:
    return _qwen3_5(stated, config) | _mixture(stated) | _shared(stated) | {"norm_topk_prob": True}


_QKVZ = (Stored(r"\.in_proj_qkvz\.weight", qkvz, ("attn_qkv.weight", "attn_gate.weight")),)

QWEN = (
    Architecture("qwen2moe", "qwen2_moe", "Qwen2MoeForCausalLM", _qwen2_moe, mixture=True),
    Architecture("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe, mixture=True),
    Architecture("qwen3vlmoe", "qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe, mixture=True),  # the text of it
    Architecture(
        "qwen3next",
        "qwen3_next",
        "Qwen3NextForCausalLM",
        _qwen3_next,
        mixture=True,
        partial_rope=True,
        by_layer=True,
        stored=_QKVZ,
    ),
    Architecture(
        "qwen35",
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        _qwen3_5,
        partial_rope=True,
        by_layer=True,
        stored=GATED_DELTA,
        nested="qwen3_5_text",
    ),
    Architecture(
        "qwen35moe",
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        _qwen3_5_moe,
        mixture=True,
        partial_rope=True,
        by_layer=True,
        stored=GATED_DELTA,
        nested="qwen3_5_moe_text",
    ),
)
