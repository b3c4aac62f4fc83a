"""Models with experts and plain attention."""

from __future__ import annotations

import warnings

from mlx_lqr.convert.architectures.dense import GRANITE_SCALES, granite_scales, rotated_part
from mlx_lqr.convert.architectures.layouts import in_one, same
from mlx_lqr.convert.architectures.row import (
    FULL,
    SIGMOID,
    SLIDING,
    SOFTMAX,
    SOFTMAX_OF_CHOSEN,
    Architecture,
    Config,
    Stated,
    Stored,
    experts,
    groups,
    layer_types,
    routed_by,
)

ROUTED = ("expert_gating_func", "expert_weights_scale", "expert_shared_count", "leading_dense_block_count")
"""What classes after DeepSeek's can compute."""


_LLAMA4_CHUNK, _MAVERICK_EXPERTS = 8192, 128


def _mixtral(stated: Stated, config: Config) -> Config:
    count, used = experts(stated)
    return {"hidden_act": "silu", "sliding_window": None, "num_local_experts": count, "num_experts_per_tok": used}


def _olmoe(stated: Stated, config: Config) -> Config:
    count, used = experts(stated)
    return {
        "num_experts": count,
        "num_experts_per_tok": used,
        "norm_topk_prob": False,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _granitemoe(stated: Stated, config: Config) -> Config:
    count, used = experts(stated)
    return granite_scales(stated, config) | {
        "attention_bias": False,
        "num_local_experts": count,
        "num_experts_per_tok": used,
    }


def experts_of_deepseek(stated: Stated) -> Config:
    """Experts in groups, with shared ones and dense layers first, however they are routed to."""
    count, used = experts(stated)
    return groups(stated) | {
        "n_routed_experts": count,
        "num_experts_per_tok": used,
        "n_shared_experts": stated.whole("expert_shared_count"),
        "moe_intermediate_size": stated.whole("expert_feed_forward_length"),
        "first_k_dense_replace": stated.whole("leading_dense_block_count"),
        "routed_scaling_factor": stated.real("expert_weights_scale", 1.0),
    }


def after_deepseek(stated: Stated, config: Config, *, bias_means: int = SIGMOID) -> Config:
    """Routing by sigmoid with a correction, in groups, with shared experts and dense layers first."""
    routed_by(stated, SIGMOID, absent=bias_means)
    return experts_of_deepseek(stated) | {
        "norm_topk_prob": stated.flag("expert_weights_norm", False),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "attention_bias": stated.holds(".attn_q.bias"),
    }


def _dots1(stated: Stated, config: Config) -> Config:
    return after_deepseek(stated, config) | {"scoring_func": "noaux_tc", "mlp_bias": False}


def _glm4_moe(stated: Stated, config: Config) -> Config:
    return after_deepseek(stated, config) | {
        "use_qk_norm": stated.holds(".attn_q_norm."),
        "partial_rotary_factor": rotated_part(stated, config),
    }


def _exaone_moe(stated: Stated, config: Config) -> Config:
    settings = after_deepseek(stated, config)
    dense = settings["first_k_dense_replace"]
    return settings | {
        "num_experts": settings["n_routed_experts"],
        "num_shared_experts": settings["n_shared_experts"],
        "is_moe_layer": [layer >= dense for layer in range(stated.layers)],
        "sliding_window": stated.whole("attention.sliding_window"),
        "layer_types": layer_types(stated, 4),
    }


def _afmoe(stated: Stated, config: Config) -> Config:
    count, used = experts(stated)
    routed_by(stated, SIGMOID, absent=SIGMOID)
    return {
        "num_experts": count,
        "num_experts_per_tok": used,
        "num_shared_experts": stated.whole("expert_shared_count"),
        "moe_intermediate_size": stated.whole("expert_feed_forward_length"),
        "num_dense_layers": stated.whole("leading_dense_block_count"),
        "route_norm": stated.flag("expert_weights_norm"),
        "route_scale": stated.real("expert_weights_scale", 1.0),
        "score_func": "sigmoid",
        "n_group": 1,
        "topk_group": 1,
        "sliding_window": stated.whole("attention.sliding_window"),
        "layer_types": layer_types(stated, 4),
        "mup_enabled": True,
    }


def _deepseek(stated: Stated, config: Config) -> Config:
    count, used = experts(stated)
    return {
        "n_routed_experts": count,
        "num_experts_per_tok": used,
        "n_shared_experts": stated.whole("expert_shared_count"),
        "moe_intermediate_size": stated.whole("expert_feed_forward_length"),
        "first_k_dense_replace": stated.whole("leading_dense_block_count"),
        "moe_layer_freq": 1,
        "attention_bias": False,
    }


def _ernie_moe(stated: Stated, config: Config) -> Config:
    count, used = experts(stated)
    if stated.holds(".exp_probs_b."):
        line = f"mlx-lm's ernie4_5_moe chooses experts without the correction in {stated.file.path.name}: ignored"
        warnings.warn(line, RuntimeWarning, stacklevel=2)
    return {
        "use_bias": False,
        "moe_num_experts": count,
        "moe_k": used,
        "moe_layer_start_index": stated.whole("leading_dense_block_count"),
        "moe_layer_end_index": stated.layers - 1,
        "moe_layer_interval": stated.whole("interleave_moe_layer_step"),
        "moe_intermediate_size": stated.whole("expert_feed_forward_length"),
        "moe_num_shared_experts": stated.whole("expert_shared_count", 0),
        "moe_gate_act": "softmax",
    }


def _minimax(stated: Stated, config: Config) -> Config:
    count, used = experts(stated)
    routed_by(stated, SIGMOID, absent=SIGMOID)
    return {
        "num_local_experts": count,
        "num_experts_per_tok": used,
        "intermediate_size": stated.whole("expert_feed_forward_length"),
        "shared_intermediate_size": 0,
        "scoring_func": "sigmoid",
        "rotary_dim": stated.whole("rope.dimension_count", config["head_dim"]),
        "use_qk_norm": stated.holds(".attn_q_norm."),
    }


def _llama4(stated: Stated, config: Config) -> Config:
    count, used = experts(stated)
    if used != 1:
        raise stated.refuse(f"uses {used} experts for a token, where mlx-lm's llama4 knows one")
    if stated.whole("attention.sliding_window", _LLAMA4_CHUNK) != _LLAMA4_CHUNK:
        raise stated.refuse("has no layers that attend in chunks, which mlx-lm's llama4 always has")
    return {  # what is not stated, llama.cpp has as constants too
        "attention_bias": stated.holds(".attn_q.bias"),
        "attention_chunk_size": _LLAMA4_CHUNK,
        "num_local_experts": count,
        "num_experts_per_tok": used,
        "interleave_moe_layer_step": stated.whole("interleave_moe_layer_step"),
        "intermediate_size": stated.whole("expert_feed_forward_length"),
        "intermediate_size_mlp": config["intermediate_size"],
        "use_qk_norm": count != _MAVERICK_EXPERTS,
        "attn_temperature_tuning": 4,
        "floor_scale": _LLAMA4_CHUNK,
        "attn_scale": 0.1,
    }


def _gpt_oss(stated: Stated, config: Config) -> Config:
    count, used = experts(stated)
    routed_by(stated, SOFTMAX_OF_CHOSEN, absent=SOFTMAX_OF_CHOSEN)
    pattern = stated.get("attention.sliding_window_pattern")
    kinds = (
        layer_types(stated)
        if pattern is not None
        else [FULL if index % 2 else SLIDING for index in range(stated.layers)]
    )
    return {
        "num_local_experts": count,
        "num_experts_per_tok": used,
        "intermediate_size": stated.whole("expert_feed_forward_length"),
        "sliding_window": stated.whole("attention.sliding_window"),
        "layer_types": kinds,
    }


def _bailing(stated: Stated, config: Config) -> Config:
    count, used = experts(stated)
    shared, width = stated.whole("expert_shared_count"), stated.whole("expert_feed_forward_length")
    return {
        "num_experts": count,
        "num_experts_per_tok": used,
        "num_shared_experts": shared,
        "moe_intermediate_size": width,
        "moe_shared_expert_intermediate_size": stated.whole("expert_shared_feed_forward_length", shared * width)
        // max(shared, 1),
        "moe_router_enable_shared_expert": shared > 0,
        "moe_router_enable_routed_scaling": True,
        "first_k_dense_replace": stated.whole("leading_dense_block_count"),
        "norm_topk_prob": stated.flag("expert_weights_norm", False),
        "routed_scaling_factor": stated.real("expert_weights_scale", 1.0),
        "rotary_dim": None,
        "norm_softmax": False,
        "use_bias": False,
        "use_qkv_bias": stated.holds(".attn_q.bias") or stated.holds(".attn_qkv.bias"),
        "norm_head": False,  # llama.cpp's converter has done it
        "use_qk_norm": stated.holds(".attn_q_norm."),
        "partial_rotary_factor": rotated_part(stated, config),
        "moe_router_enable_expert_bias": stated.holds(".exp_probs_b."),
    }


def _bailing1(stated: Stated, config: Config) -> Config:
    routed_by(stated, SOFTMAX, absent=SOFTMAX)
    return _bailing(stated, config) | {"score_function": "softmax", "n_group": 1, "topk_group": 1}


def _bailing2(stated: Stated, config: Config) -> Config:
    routed_by(stated, SIGMOID, absent=SIGMOID)
    return _bailing(stated, config) | groups(stated) | {"score_function": "sigmoid"}


_SINKS = (Stored(r"\.sinks", same, ("attn_sinks.weight",)),)

_QKV = (
    Stored(r"\.query_key_value\.weight", in_one, ("attn_q.weight", "attn_k.weight", "attn_v.weight")),
    Stored(r"\.attention\.dense\.weight", same, ("attn_output.weight",)),
)
_GATE = ((r"\.gate\.gate_proj\.", ".gate."),)

MIXTURES = (
    Architecture("llama", "mixtral", "MixtralForCausalLM", _mixtral, mixture=True, neighbours_turn=True),
    Architecture(
        "llama4",
        "llama4",
        "Llama4ForConditionalGeneration",
        _llama4,
        mixture=True,
        nested="llama4_text",
    ),
    Architecture("olmoe", "olmoe", "OlmoeForCausalLM", _olmoe, mixture=True),
    Architecture(
        "granitemoe",
        "granitemoe",
        "GraniteMoeForCausalLM",
        _granitemoe,
        mixture=True,
        neighbours_turn=True,
        understands=GRANITE_SCALES,
    ),
    Architecture("dots1", "dots1", "Dots1ForCausalLM", _dots1, mixture=True, understands=ROUTED),
    Architecture(
        "glm4moe", "glm4_moe", "Glm4MoeForCausalLM", _glm4_moe, mixture=True, partial_rope=True, understands=ROUTED
    ),
    Architecture("exaone-moe", "exaone_moe", "ExaoneMoeForCausalLM", _exaone_moe, mixture=True, understands=ROUTED),
    Architecture("afmoe", "afmoe", "AfmoeForCausalLM", _afmoe, mixture=True, understands=ROUTED),
    Architecture(
        "deepseek",
        "deepseek",
        "DeepseekForCausalLM",
        _deepseek,
        mixture=True,
        neighbours_turn=True,
        understands=("expert_shared_count", "leading_dense_block_count"),
    ),
    Architecture(
        "ernie4_5-moe",
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        _ernie_moe,
        mixture=True,
        understands=ROUTED,
        unused=(r"\.exp_probs_b\.",),
    ),
    Architecture(
        "minimax-m2", "minimax", "MiniMaxM2ForCausalLM", _minimax, mixture=True, partial_rope=True, understands=ROUTED
    ),
    Architecture(
        "gpt-oss", "gpt_oss", "GptOssForCausalLM", _gpt_oss, mixture=True, stored=_SINKS, understands=ROUTED[:1]
    ),
    Architecture(
        "bailingmoe",
        "bailing_moe",
        "BailingMoeForCausalLM",
        _bailing1,
        mixture=True,
        partial_rope=True,
        renames=_GATE,
        stored=_QKV,
        understands=ROUTED,
    ),
    Architecture(
        "bailingmoe2",
        "bailing_moe",
        "BailingMoeV2ForCausalLM",
        _bailing2,
        mixture=True,
        partial_rope=True,
        renames=_GATE,
        understands=ROUTED,
    ),
)
