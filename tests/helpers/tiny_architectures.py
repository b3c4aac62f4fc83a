"""A tiny configuration of any architecture that mlx-lm has, made from what its module asks for.

mlx-lm's modules declare the keys of their config.json as fields of a dataclass. `RULES` gives each name a small value,
whatever the family, so that a module of a new version needs no work here. What a family wants beyond that, such as the
pattern of its layers, is in `SPECIAL`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from typing import Any

import mlx_lm.models
from mlx_lm import utils as library

LAYERS, VOCABULARY, LENGTH, WINDOW = 4, 64, 512, 6
SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)


def _named(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


RULES: dict[str, Any] = {
    **_named(LAYERS, "num_hidden_layers num_layers n_layer n_layers num_transformer_layers"),
    **_named(VOCABULARY, "vocab_size num_vocab vocab_size_per_layer_input"),
    **_named(LENGTH, "max_position_embeddings n_positions n_ctx model_max_length block_size"),
    **_named(WINDOW, "sliding_window sliding_window_size window_size attention_window_size"),
    **_named(32, "hidden_size hidden_dim d_model n_embd model_dim block_dim dim_model_base"),
    **_named(64, "intermediate_size ffn_hidden_size n_inner ff_intermediate_size block_ff_dim intermediate_size_mlp"),
    **_named(64, "dense_intermediate_size"),
    **_named(32, "moe_intermediate_size moe_shared_expert_intermediate_size shared_expert_intermediate_size"),
    **_named(32, "expert_ffn_hidden_size shared_intermediate_size share_expert_dim"),
    **_named(4, "num_attention_heads num_heads n_head n_heads swa_num_attention_heads num_swa_attention_heads"),
    **_named(2, "num_key_value_heads num_kv_heads n_kv_heads num_attention_groups swa_num_key_value_heads"),
    **_named(2, "num_swa_key_value_heads n_shared_head"),
    **_named(8, "head_dim kv_channels global_head_dim hidden_size_per_head swa_head_dim swa_v_head_dim v_head_dim"),
    **_named(8, "qk_nope_head_dim qk_rope_head_dim hidden_size_per_layer_input"),
    **_named(16, "kv_lora_rank q_lora_rank o_lora_rank"),
    **_named(8, "a_low_rank_dim v_low_rank_dim gate_low_rank_dim decay_low_rank_dim laurel_rank"),
    **_named(4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    **_named(2, "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts moe_top_k zero_expert_num"),
    **_named(1, "n_shared_experts num_shared_experts num_shared_expert moe_num_shared_experts"),
    **_named(1, "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers moe_layer_freq"),
    **_named(1, "decoder_sparse_step moe_layer_interval moe_layer_start_index"),
    **_named([1], "mlp_only_layers"),
    **_named(2, "full_attention_interval layer_group_size num_kv_reuse_layers sliding_window_pattern"),
    **_named(4, "conv_kernel conv1d_width linear_conv_kernel_dim short_conv_kernel_size mamba_d_conv time_step_rank"),
    **_named(3, "conv_L_cache conv_window"),
    **_named(16, "state_size ssm_state_size mamba_d_state mamba_head_dim mamba_d_head linear_value_head_dim"),
    **_named(64, "mamba_d_ssm"),
    **_named(4, "mamba_num_heads mamba_n_heads linear_num_value_heads"),
    **_named(2, "mamba_expand mamba_n_groups n_groups group_norm_size linear_num_key_heads"),
    **_named(32, "linear_key_head_dim"),
    **_named(4, "rotary_dim"),
    **_named(SLIDING, "layer_types"),
    **_named([0.0, 10.0], "time_step_limit"),
    **_named(2, "index_n_heads"),
    **_named(16, "index_head_dim"),
    **_named(5, "index_topk"),
    **_named(10000.0, "rope_theta swa_rope_theta rope_local_base_freq rotary_emb_base"),
    **_named(0.5, "partial_rotary_factor rotary_pct residual_multiplier"),
    **_named(8.0, "query_pre_attn_scalar"),
    **_named(1.5, "routed_scaling_factor scale_depth logits_scaling"),
    **_named(3.0, "embedding_multiplier scale_emb"),
    **_named(0.25, "attention_multiplier"),
    **_named(True, "norm_topk_prob use_qk_norm qk_norm qk_layernorm tie_word_embeddings"),
    **_named("sigmoid", "scoring_func"),
    **_named("noaux_tc", "topk_method"),
}
"""Name of a field -> its value. Where a field is not named here and has no default, `_unnamed` decides by its kind."""

KDA = {
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
    "num_heads": 4,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
}
"""Layers count from 1 here."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {
    "rope_type": "yarn",
    "type": "yarn",
    "factor": 2.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 256,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim_scale_factor": 2.0},
    "afmoe": {"num_dense_layers": 1},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2, "tie_word_embeddings": None},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"topk_method": "greedy", "rope_scaling": YARN},
    "deepseek_v41": {
        "compress_ratios": [1, 4, 4, 1],
        "kv_source_layer_ids": [1],
        "index_source_layer_ids": [1],
        "candidate_topk_blocks": 4,
        "o_groups": 2,
        "head_dim": 32,  # and not less, or nothing is rounded to 8 and 4 bits
        "index_head_dim": 32,
    },
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True, True, True]},
    "gear": {"layer_types": ["conv_mixer", "sliding_attention", "full_attention", "conv_mixer"]},
    "gemma3n": {
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "final_logit_softcapping": 30.0,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1000000.0, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_theta": 10000.0},
        },
    },
    "glm_moe_dsa": {"rope_parameters": ROPE},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {
        "use_cla": True,
        "cla_share_factor": 2,
        "use_mixed_mlp_moe": True,
        "rope_scaling": {"type": "dynamic", "alpha": 100.0, "factor": 1.0},
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k3": {"linear_attn_config": KDA, "attn_res_block_size": 2},
    "kimi_linear": {"linear_attn_config": KDA},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lille-130m": {"n_embd": 64},
    "llama": {"layer_types": None},
    "llama4": {"attention_chunk_size": 8, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "longcat_flash_ngram": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "mellum": {"rope_parameters": dict.fromkeys(SLIDING, ROPE)},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "moe_layer_freq": [0, 1, 1, 1],
        "partial_rotary_factor": 0.5,
    },
    "minicpm": {"tie_word_embeddings": None},
    "minicpm3": {"rope_scaling": {"original_max_position_embeddings": 256, "short_factor": 1.0, "long_factor": 1.0}},
    "minimax": {"num_key_value_heads": 2},
    "minimax_m3_vl": {"index_block_size": 4, "index_topk_blocks": 2, "moe_layer_freq": [0, 1, 1, 1]},
    "ministral3": {"rope_parameters": YARN | {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.1}},
    "mistral4": {"rope_parameters": YARN | {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.1}},
    "muse_spark": {
        "rope_parameters": {"rope_theta": 10000.0},
        "layer_rope_theta": [10000.0, 0.0, 10000.0, 0.0],
        "final_logit_softcapping": 20.0,
        "output_multiplier": 0.2,
        "moe_hidden_size": 32,
        "num_shared_experts": None,
    },
    "nanbeige": {"num_loops": 2},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 2.0}},
        ],
    },
    "nemotron_h": {"num_hidden_layers": 5, "hybrid_override_pattern": ["M", "*", "-", "E", "M"], "layer_types": None},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "openelm": {
        "ffn_dim_divisor": 8,
        "num_query_heads": [4, 4, 8, 8],
        "num_kv_heads": [2, 2, 4, 4],
        "ffn_multipliers": [1.0, 1.5, 2.0, 2.0],
    },
    "phi3small": {"vocab_size": 100352, "dense_attention_every_n_layers": 2, "gegelu_limit": 20.0},
    "qwen3_vl_moe": {"tie_word_embeddings": None},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "logits_soft_cap": 30.0},
    "smollm3": {"layer_types": None},
    "spark2_5": {"rope_parameters": dict.fromkeys(SLIDING, ROPE)},
    "step3p5": {"attention_other_setting": {"num_attention_heads": 8, "num_attention_groups": 4}},
}
"""Architecture -> what it wants otherwise; None leaves a field out."""

TEXT = {
    "gemma3": ("gemma3_text", "ModelArgs"),
    "gemma3n": ("gemma3n", "TextConfig"),
    "gemma4": ("gemma4_text", "ModelArgs"),
    "kimi_k25": ("deepseek_v3", "ModelArgs"),
    "kimi_k3": ("kimi_k3", "TextArgs"),
    "kimi_vl": ("kimi_vl", "TextArgs"),
    "lfm2-vl": ("lfm2", "ModelArgs"),
    "llama4": ("llama4", "TextArgs"),
    "minimax_m3_vl": ("minimax_m3_vl", "TextArgs"),
    "mistral3": ("ministral3", "ModelArgs"),
    "muse_spark": ("muse_spark", "TextArgs"),
    "pixtral": ("llama", "ModelArgs"),
    "qwen2_vl": ("qwen2", "ModelArgs"),
    "qwen3_5": ("qwen3_5", "TextModelArgs"),
    "qwen3_5_moe": ("qwen3_5", "TextModelArgs"),
    "qwen3_vl": ("qwen3", "ModelArgs"),
    "qwen3_vl_moe": ("qwen3_moe", "ModelArgs"),
}
"""Architecture -> module and dataclass of its nested text_config."""

WITHOUT = {
    "olmo": "its module ends the process without the package ai2-olmo",
    "prism_hadamard_qwen35": "a packed format of one vendor, whose weights come with a manifest",
}
"""Architectures of which no tiny model is made, and why."""


@functools.cache
def architectures() -> tuple[str, ...]:
    """The modules of mlx_lm.models that are language models, but for those in `WITHOUT`."""
    names = [name for _, name, _ in pkgutil.iter_modules(mlx_lm.models.__path__) if name not in WITHOUT]
    return tuple(name for name in names if _is_model(name))


def _is_model(name: str) -> bool:
    try:
        return hasattr(_module(name), "ModelArgs")
    except (Exception, SystemExit):  # whoever makes its config hears why
        return True


def tiny_config(name: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a tiny model.

    Args:
        name: an architecture of mlx-lm, by its module's name.
        **changes: other values; of the text's part, where it is nested.

    Raises:
        LookupError: the module asks for something of which nothing is known here.
    """
    declared = _module(name).ModelArgs
    if not any(field.name == "text_config" for field in dataclasses.fields(declared)):
        return _values(name, declared, changes) | _model_type(name)
    if name not in TEXT:
        raise LookupError(f"{name}: say in TEXT which dataclass its text_config is of")
    inner, kind = TEXT[name]
    own = inner if kind == "ModelArgs" else f"{name}_text"
    text = _values(name if name in SPECIAL else inner, getattr(_module(inner), kind), changes)
    return {**_model_type(name), "vocab_size": VOCABULARY, "text_config": text | {"model_type": own}}


def _module(name: str) -> Any:
    return importlib.import_module(f"mlx_lm.models.{name}")


def _model_type(name: str) -> dict[str, Any]:
    """By what a config names this module: its own name, or another's with a class."""
    for (family, kind), module in getattr(library, "MODEL_ARCHITECTURE_REMAPPING", {}).items():
        if module == name:
            return {"model_type": family, "architectures": [kind]}
    return {"model_type": name}


def _values(name: str, declared: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """A value for every field of the dataclass that is known or wanted."""
    known = {**RULES, "model_type": name, **SPECIAL.get(name, {}), **changes}
    values: dict[str, Any] = {"max_position_embeddings": LENGTH}
    for field in dataclasses.fields(declared):
        wanted = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if wanted or known.get(field.name) is not None:
            values[field.name] = known[field.name] if field.name in known else _unnamed(name, field)
    return values


def _unnamed(name: str, field: dataclasses.Field[Any]) -> Any:
    """What is wanted and in no rule: switches are off, scaling there is none, rounding is guarded as usual."""
    if field.type in (bool, "bool"):
        return False
    if "eps" in field.name:
        return 1e-5
    if field.name == "rope_scaling":
        return None
    raise LookupError(f"{name}: there is no rule for {field.name}, {field.type}: add one to RULES or to SPECIAL")
