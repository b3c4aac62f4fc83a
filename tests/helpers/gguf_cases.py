"""Tiny models of the architectures that come through GGUF: mlx-lm's config, and what llama.cpp's converter states.

Keys are written out as that converter writes them, beside those that every file has (`gguf_written.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from helpers.tiny_gguf import VOCABULARY

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e4,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


@dataclass(frozen=True)
class Case:
    """`arch` is llama.cpp's name, `model_type` mlx-lm's module, `config` what differs from `BASE`, `keys` from usual
    metadata (None: left out). `traits`: how the converter stores weights of it."""

    arch: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    traits: tuple[str, ...] = ()
    nested: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The config, without what is around a text model."""
        return BASE | {"model_type": self.nested or self.model_type} | self.config


def _part(share: float, theta: float = 5e4) -> dict[str, Any]:
    return {"partial_rotary_factor": share, "rope_theta": theta}


LAYER_NORM = {"attention.layer_norm_epsilon": 1e-5}
HALF = {"rope.dimension_count": 8}
SLIDES = {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False]}
KINDS = ["sliding_attention", "full_attention"]
EXPERTS = {"expert_count": 4, "expert_used_count": 2}
EXPERT_WIDTH = {"expert_feed_forward_length": 32}
QWEN_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "shared_expert_intermediate_size": 40,
}
QWEN_SHARED = {**EXPERTS, **EXPERT_WIDTH, "expert_shared_feed_forward_length": 40}
DEEP = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 2,
    "topk_group": 1,
}
DEEP_KEYS = {
    "expert_count": 8,
    "expert_used_count": 2,
    **EXPERT_WIDTH,
    "expert_shared_count": 1,
    "leading_dense_block_count": 1,
    "expert_gating_func": 2,
    "expert_weights_scale": 2.5,
    "expert_weights_norm": True,
    "expert_group_count": 2,
    "expert_group_used_count": 1,
}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
LATENT_KEYS = {
    "attention.head_count_kv": 1,
    "attention.key_length": 40,
    "attention.value_length": 32,
    "attention.q_lora_rank": 24,
    "attention.kv_lora_rank": 32,
    "attention.key_length_mla": 24,
    "attention.value_length_mla": 12,
    **HALF,
}
GRANITE = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 5.0,
    "residual_multiplier": 0.3,
    "logits_scaling": 3.0,
}
GRANITE_KEYS = {"attention.scale": 0.2, "embedding_scale": 5.0, "residual_scale": 0.3, "logit_scale": 3.0}
DELTA = {
    "linear_num_value_heads": 6,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
DELTA_KEYS = {
    "ssm.time_step_rank": 6,
    "ssm.group_count": 2,
    "ssm.state_size": 16,
    "ssm.inner_size": 48,
    "ssm.conv_kernel": 4,
    "full_attention_interval": 2,
    **HALF,
}
QWEN35_ROPE = {"rope_parameters": {"type": "default", "partial_rotary_factor": 0.5, "rope_theta": 5e4}}
NO_HEADS = {"attention.head_count": 0, "attention.head_count_kv": None, "attention.key_length": None}
STATE_KEYS = {"ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.inner_size": 128}
STATE2 = {**STATE_KEYS, "ssm.time_step_rank": 8, "ssm.group_count": 1}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "mamba_d_ssm": 128,
}
FALCON = {
    f"{name}_multiplier": 1.0
    for name in ("attention_in", "attention_out", "embedding", "key", "lm_head", "ssm_in", "ssm_out")
}
GEMMA4_ROPE = {
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "layer_types": KINDS * 2,
    "num_hidden_layers": 4,
    "final_logit_softcapping": 30.0,
    "rope_parameters": GEMMA4_ROPE,
    "tie_word_embeddings": True,
}
GEMMA4_KEYS = {
    **SLIDES,
    "attention.sliding_window_pattern": [True, False] * 2,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.key_length_swa": 16,
    "attention.value_length_swa": 16,
    "rope.dimension_count": 32,
    "rope.dimension_count_swa": 16,
    "rope.freq_base": 1e6,
    "rope.freq_base_swa": 1e4,
    "final_logit_softcapping": 30.0,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
}
BAILING = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}

CASES: dict[str, Case] = {
    "qwen2vl": Case("qwen2vl", "qwen2", keys={"rope.dimension_sections": [4, 2, 2, 0]}),
    "qwen3vl": Case("qwen3vl", "qwen3", keys={"rope.dimension_sections": [4, 2, 2, 0]}),
    "phi2": Case(
        "phi2",
        "phi",
        {"intermediate_size": 256, "num_key_value_heads": 4, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
        {**LAYER_NORM, **HALF},
    ),
    "olmo3": Case("olmo2", "olmo3", {"sliding_window": 8, "layer_types": KINDS}, SLIDES),
    "ministral3": Case(
        "mistral3",
        "ministral3",
        {
            "rope_parameters": {
                **YARN,
                "rope_theta": 5e4,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            }
        },
        {**YARN_KEYS, "rope.scaling.yarn_log_multiplier": 1.0, "attention.temperature_scale": 0.1},
        ("neighbours",),
    ),
    "glm4": Case("glm4", "glm4", {"attention_bias": True, **_part(0.5)}, HALF),
    "granite": Case("granite", "granite", GRANITE, GRANITE_KEYS, ("neighbours",)),
    "ernie4_5": Case("ernie4_5", "ernie4_5", {"use_bias": False}),
    "nemotron": Case(
        "nemotron",
        "nemotron",
        {"hidden_act": "relu2", "norm_eps": 1e-5, **_part(0.5)},
        {**LAYER_NORM, **HALF},
        ("one_plus",),
    ),
    "exaone": Case("exaone", "exaone", {"num_layers": 2, "layer_norm_epsilon": 1e-5}),
    "exaone4": Case("exaone4", "exaone4", {"sliding_window": 8, "sliding_window_pattern": "LG"}, SLIDES),
    "hunyuan-dense": Case("hunyuan-dense", "hunyuan_v1_dense", {"use_qk_norm": True}),
    "seed_oss": Case("seed_oss", "seed_oss", {"attention_bias": True, "attention_out_bias": False}),
    "command-r": Case(
        "command-r",
        "cohere",
        {"layer_norm_eps": 1e-5, "logit_scale": 0.25, "tie_word_embeddings": True},
        {**LAYER_NORM, "logit_scale": 0.25},
    ),
    "cohere2": Case(
        "cohere2",
        "cohere2",
        {
            "layer_norm_eps": 1e-5,
            "logit_scale": 0.25,
            "tie_word_embeddings": True,
            "sliding_window": 8,
            "sliding_window_pattern": 4,
            "num_hidden_layers": 4,
        },
        {**LAYER_NORM, "logit_scale": 0.25, "attention.sliding_window": 8},
    ),
    "stablelm": Case(
        "stablelm",
        "stablelm",
        {"layer_norm_eps": 1e-5, "use_qkv_bias": True, **_part(0.5)},
        {**LAYER_NORM, **HALF, "use_parallel_residual": False},
    ),
    "starcoder2": Case("starcoder2", "starcoder2", {"norm_epsilon": 1e-5, "tie_word_embeddings": True}, LAYER_NORM),
    "starcoder": Case(
        "starcoder",
        "gpt_bigcode",
        {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 256,
            "n_positions": 256,
            "layer_norm_epsilon": 1e-5,
            "intermediate_size": 256,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        LAYER_NORM,
    ),
    "gpt2": Case(
        "gpt2",
        "gpt2",
        {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_ctx": 256,
            "n_positions": 256,
            "layer_norm_epsilon": 1e-5,
            "intermediate_size": 256,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
        LAYER_NORM,
    ),
    "gptneox": Case(
        "gptneox",
        "gpt_neox",
        {
            "layer_norm_eps": 1e-5,
            "rotary_emb_base": 5e4,
            "rotary_pct": 0.5,
            "intermediate_size": 256,
            "num_key_value_heads": 4,
        },
        {**LAYER_NORM, **HALF, "use_parallel_residual": True},
    ),
    "internlm2": Case("internlm2", "internlm2", {"bias": False}, {}, ("neighbours",)),
    "minicpm": Case(
        "minicpm",
        "minicpm",
        {"scale_emb": 3.0, "scale_depth": 1.4, "dim_model_base": 32},
        {"embedding_scale": 3.0, "residual_scale": 1.4 / 2**0.5, "logit_scale": 2.0},
        ("neighbours",),
    ),
    "apertus": Case("apertus", "apertus", {"post_norm": False, "qk_norm": True}),
    "gemma3n": Case(
        "gemma3n",
        "gemma3n",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "sliding_window": 8,
            "rope_local_base_freq": 1e4,
            "final_logit_softcapping": 30.0,
            "layer_types": KINDS * 2,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 16,
            "altup_num_inputs": 4,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
            "tie_word_embeddings": True,
        },
        {
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [True, False] * 2,
            "rope.freq_base_swa": 1e4,
            "feed_forward_length": [96] * 4,
            "altup.active_idx": 0,
            "altup.num_inputs": 4,
            "embedding_length_per_layer_input": 16,
            "attention.shared_kv_layers": 2,
            "final_logit_softcapping": 30.0,
            "activation_sparsity_scale": [1.6448536, -1e9, -1e9, -1e9],
        },
        nested="gemma3n_text",
    ),
    "gemma4": Case(
        "gemma4",
        "gemma4_text",
        {
            **GEMMA4,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "use_double_wide_mlp": True,
        },
        {
            **GEMMA4_KEYS,
            "feed_forward_length": [96, 96, 192, 192],
            "attention.shared_kv_layers": 2,
            "embedding_length_per_layer_input": 16,
        },
        ("proportional",),
    ),
    "gemma4moe": Case(
        "gemma4",
        "gemma4_text",
        {
            **GEMMA4,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "use_double_wide_mlp": False,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        {**GEMMA4_KEYS, **EXPERTS, **EXPERT_WIDTH, "attention.head_count_kv": [2, 1, 2, 1]},
        ("proportional", "gate_up_in_one"),
    ),
    "qwen2moe": Case("qwen2moe", "qwen2_moe", QWEN_EXPERTS, QWEN_SHARED),
    "qwen3vlmoe": Case(
        "qwen3vlmoe", "qwen3_moe", {**QWEN_EXPERTS, "norm_topk_prob": True}, {**EXPERTS, **EXPERT_WIDTH}
    ),
    "qwen3next": Case(
        "qwen3next",
        "qwen3_next",
        {**QWEN_EXPERTS, **DELTA, **_part(0.5), "norm_topk_prob": True},
        {**QWEN_SHARED, **DELTA_KEYS},
        ("qkvz",),
    ),
    "qwen35": Case("qwen35", "qwen3_5", {**DELTA, **QWEN35_ROPE}, DELTA_KEYS, ("tiled",), nested="qwen3_5_text"),
    "qwen35moe": Case(
        "qwen35moe",
        "qwen3_5_moe",
        {**QWEN_EXPERTS, **DELTA, **QWEN35_ROPE, "norm_topk_prob": True},
        {**QWEN_SHARED, **DELTA_KEYS},
        ("tiled",),
        nested="qwen3_5_moe_text",
    ),
    "llama4": Case(
        "llama4",
        "llama4",
        {
            "attention_chunk_size": 8192,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "intermediate_size": 32,
            "intermediate_size_mlp": 96,
            "use_qk_norm": True,
            "num_hidden_layers": 4,
        },
        {
            "expert_count": 4,
            "expert_used_count": 1,
            **EXPERT_WIDTH,
            "feed_forward_length": 96,
            "interleave_moe_layer_step": 2,
        },
        nested="llama4_text",
    ),
    "olmoe": Case("olmoe", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}, EXPERTS),
    "granitemoe": Case(
        "granitemoe",
        "granitemoe",
        {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
        {**GRANITE_KEYS, **EXPERTS},
        ("neighbours",),
    ),
    "dots1": Case("dots1", "dots1", {**DEEP, "scoring_func": "noaux_tc"}, DEEP_KEYS),
    "glm4moe": Case("glm4moe", "glm4_moe", {**DEEP, **_part(0.5), "use_qk_norm": True}, {**DEEP_KEYS, **HALF}),
    "exaone-moe": Case(
        "exaone-moe",
        "exaone_moe",
        {
            **DEEP,
            "num_experts": 8,
            "num_shared_experts": 1,
            "sliding_window": 8,
            "layer_types": KINDS,
            "is_moe_layer": [False, True],
        },
        {**DEEP_KEYS, **SLIDES, "expert_shared_feed_forward_length": 32},
    ),
    "afmoe": Case(
        "afmoe",
        "afmoe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 32,
            "num_dense_layers": 1,
            "route_scale": 2.5,
            "sliding_window": 8,
            "layer_types": KINDS,
        },
        {
            **EXPERTS,
            **EXPERT_WIDTH,
            **SLIDES,
            "expert_shared_count": 1,
            "leading_dense_block_count": 1,
            "expert_weights_scale": 2.5,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
        },
    ),
    "deepseek": Case(
        "deepseek",
        "deepseek",
        {
            "n_routed_experts": 4,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
        {**EXPERTS, **EXPERT_WIDTH, "expert_shared_count": 2, "leading_dense_block_count": 1},
        ("neighbours",),
    ),
    "ernie4_5-moe": Case(
        "ernie4_5-moe",
        "ernie4_5_moe",
        {
            "use_bias": False,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 2,
        },
        {
            **EXPERTS,
            **EXPERT_WIDTH,
            "expert_shared_count": 2,
            "leading_dense_block_count": 1,
            "interleave_moe_layer_step": 1,
            "expert_shared_feed_forward_length": 48,
        },
    ),
    "minimax-m2": Case(
        "minimax-m2",
        "minimax",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 32,
            "shared_intermediate_size": 0,
            "rotary_dim": 8,
        },
        {**EXPERTS, **EXPERT_WIDTH, **HALF, "expert_gating_func": 2},
    ),
    "gpt-oss": Case(
        "gpt-oss",
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 32,
            "sliding_window": 8,
            "layer_types": KINDS,
            "rope_scaling": YARN,
        },
        {**EXPERTS, **EXPERT_WIDTH, **YARN_KEYS, "attention.sliding_window": 8},
    ),
    "bailingmoe": Case(
        "bailingmoe",
        "bailing_moe",
        {**BAILING, "first_k_dense_replace": 0},
        {
            "expert_count": 8,
            "expert_used_count": 2,
            **EXPERT_WIDTH,
            "leading_dense_block_count": 0,
            "expert_shared_count": 1,
            "expert_weights_norm": True,
            "expert_weights_scale": 1.0,
        },
        ("neighbours", "qkv_apart"),
    ),
    "bailingmoe2": Case(
        "bailingmoe2",
        "bailing_moe",
        {
            **BAILING,
            **_part(0.5),
            "use_qk_norm": True,
            "routed_scaling_factor": 2.5,
            "score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "n_group": 2,
            "topk_group": 1,
        },
        {**DEEP_KEYS, **HALF},
    ),
    "deepseek2": Case(
        "deepseek2",
        "deepseek_v2",
        {
            **DEEP,
            **LATENT,
            "topk_method": "group_limited_greedy",
            "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
        },
        {
            **DEEP_KEYS,
            **LATENT_KEYS,
            **YARN_KEYS,
            "expert_gating_func": 1,
            "expert_weights_norm": None,
            "rope.scaling.yarn_log_multiplier": 0.07,
        },
        ("kv_b",),
    ),
    "mistral4": Case(
        "mistral4",
        "mistral4",
        {
            **DEEP,
            **LATENT,
            "first_k_dense_replace": 0,
            "rope_parameters": {
                **YARN,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "rope_theta": 5e4,
                "llama_4_scaling_beta": 0.1,
            },
            "head_dim": 24,
        },
        {
            **DEEP_KEYS,
            **LATENT_KEYS,
            **YARN_KEYS,
            "leading_dense_block_count": 0,
            "expert_gating_func": 1,
            "rope.scaling.yarn_log_multiplier": 0.1,
            "attention.temperature_scale": 0.1,
        },
    ),
    "deepseek3": Case("deepseek2", "deepseek_v3", {**DEEP, **LATENT}, {**DEEP_KEYS, **LATENT_KEYS}),
    "lfm2": Case(
        "lfm2",
        "lfm2",
        {
            "norm_eps": 1e-5,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_dim": 64,
            "block_ff_dim": 96,
            "block_multiple_of": 1,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention"],
            "tie_word_embeddings": True,
        },
        {"shortconv.l_cache": 3, "attention.head_count_kv": [0, 2]},
    ),
    "lfm2moe": Case(
        "lfm2moe",
        "lfm2_moe",
        {
            "norm_eps": 1e-5,
            "conv_bias": False,
            "conv_L_cache": 3,
            "layer_types": ["conv", "full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "use_expert_bias": True,
            "num_dense_layers": 1,
            "tie_word_embeddings": True,
        },
        {
            "shortconv.l_cache": 3,
            "attention.head_count_kv": [0, 2],
            **EXPERTS,
            **EXPERT_WIDTH,
            "leading_dense_block_count": 1,
            "expert_gating_func": 2,
        },
    ),
    "mamba": Case(
        "mamba",
        "mamba",
        {
            "intermediate_size": 128,
            "state_size": 16,
            "conv_kernel": 4,
            "use_bias": False,
            "use_conv_bias": True,
            "time_step_rank": 4,
            "tie_word_embeddings": True,
        },
        {**NO_HEADS, **STATE_KEYS, "ssm.time_step_rank": 4, "feed_forward_length": 0, "ssm.dt_b_c_rms": False},
    ),
    "mamba2": Case(
        "mamba2",
        "mamba2",
        {
            "num_heads": 8,
            "head_dim": 16,
            "intermediate_size": 128,
            "state_size": 16,
            "layer_norm_epsilon": 1e-5,
            "conv_kernel": 4,
            "n_groups": 1,
            "use_bias": False,
            "use_conv_bias": True,
            "time_step_limit": [0.0, 1e30],
            "time_step_rank": "auto",
            "tie_word_embeddings": True,
        },
        {**NO_HEADS, **STATE2, "feed_forward_length": 0},
        ("columns",),
    ),
    "jamba": Case(
        "jamba",
        "jamba",
        {
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 0,
            "expert_layer_period": 1,
            "mamba_d_conv": 4,
            "mamba_d_state": 16,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
            "num_experts": 1,
            "num_experts_per_tok": 1,
        },
        {**STATE_KEYS, "ssm.time_step_rank": 4, "attention.head_count_kv": [0, 2], "expert_count": 1},
    ),
    "granitehybrid": Case(
        "granitehybrid",
        "granitemoehybrid",
        {
            **GRANITE,
            **MAMBA2,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 32,
            "shared_intermediate_size": 40,
            "position_embedding_type": "nope",
            "time_step_limit": [0.0, 1e30],
        },
        {
            **GRANITE_KEYS,
            **STATE2,
            **EXPERTS,
            "attention.head_count_kv": [0, 2],
            "expert_shared_feed_forward_length": 40,
            "rope.scaling.finetuned": False,
        },
        ("neighbours", "columns"),
    ),
    "falcon-h1": Case(
        "falcon-h1",
        "falcon_h1",
        {**MAMBA2, **FALCON, "mlp_multipliers": [1.0, 1.0], "ssm_multipliers": [1.0] * 5},
        STATE2,
        ("columns",),
    ),
    "nemotron_h": Case(
        "nemotron_h",
        "nemotron_h",
        {
            "hybrid_override_pattern": ["M", "*", "-"],
            "num_hidden_layers": 3,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "mamba_proj_bias": False,
            "ssm_state_size": 16,
            "conv_kernel": 4,
            "n_groups": 2,
            "layer_norm_epsilon": 1e-5,
            "use_bias": False,
            "use_conv_bias": True,
        },
        {
            **STATE2,
            "ssm.group_count": 2,
            "attention.head_count_kv": [0, 2, 0],
            "feed_forward_length": [0, 0, 96],
            **LAYER_NORM,
        },
        ("columns",),
    ),
    "nemotron_h_moe": Case(
        "nemotron_h_moe",
        "nemotron_h",
        {
            "hybrid_override_pattern": ["M", "*", "E"],
            "num_hidden_layers": 3,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "mamba_proj_bias": False,
            "ssm_state_size": 16,
            "conv_kernel": 4,
            "n_groups": 2,
            "layer_norm_epsilon": 1e-5,
            "use_bias": False,
            "use_conv_bias": True,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 40,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "n_group": 1,
            "topk_group": 1,
        },
        {
            **STATE2,
            "ssm.group_count": 2,
            **EXPERTS,
            **EXPERT_WIDTH,
            "attention.head_count_kv": [0, 2, 0],
            "feed_forward_length": [0, 0, 32],
            "expert_shared_feed_forward_length": 40,
            "expert_shared_count": 1,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            **LAYER_NORM,
        },
        ("columns",),
    ),
}
