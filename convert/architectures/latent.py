"""DeepSeek's latent attention."""

from __future__ import annotations

from mlx_lqr.convert.architectures.layouts import keys_out, same
from mlx_lqr.convert.architectures.mixtures import ROUTED, after_deepseek, experts_of_deepseek
from mlx_lqr.convert.architectures.row import (
    SIGMOID,
    SOFTMAX,
    Architecture,
    Config,
    Stated,
    Stored,
    routed_by,
)
from mlx_lqr.convert.rope import rope_scaling
from mlx_lqr.errors import InputError


def _by_sigmoid(stated: Stated) -> bool:
    return stated.whole("expert_gating_func", SIGMOID if stated.holds(".exp_probs_b.") else SOFTMAX) == SIGMOID


def _latent(stated: Stated, config: Config) -> Config:
    turning, keys = stated.whole("rope.dimension_count"), stated.whole("attention.key_length_mla")
    if not 0 < turning < keys:
        raise InputError(f"{stated.file.path} turns {turning} of heads of {keys}: download it again")
    return {
        "num_key_value_heads": config["num_attention_heads"],
        "kv_lora_rank": stated.whole("attention.kv_lora_rank"),
        "q_lora_rank": stated.whole("attention.q_lora_rank") if stated.holds(".attn_q_a.") else None,
        "qk_rope_head_dim": turning,
        "qk_nope_head_dim": keys - turning,
        "v_head_dim": stated.whole("attention.value_length_mla"),
        "moe_layer_freq": 1,
        "attention_bias": False,
        "rope_scaling": _scaling(stated, config, turning),
    }


def _scaling(stated: Stated, config: Config, turning: int) -> Config | None:
    scaling = rope_scaling(stated.file, stated.arch, turning, config["rope_theta"])
    if scaling is None:
        return None
    if scaling["rope_type"] != "yarn":
        raise stated.refuse(f"scales RoPE by {scaling['rope_type']!r}, which mlx-lm's {config['model_type']} cannot do")
    mscale = round(stated.real("rope.scaling.yarn_log_multiplier", 0.0) / 0.1, 6)  # the converter's own factor
    return scaling | {"type": "yarn", "mscale": mscale, "mscale_all_dim": mscale}


def _by_softmax(stated: Stated) -> Config:
    routed_by(stated, SOFTMAX, absent=SOFTMAX)
    return experts_of_deepseek(stated)


def _deepseek2(stated: Stated, config: Config) -> Config:
    routing = _by_softmax(stated)
    if stated.flag("expert_weights_norm", False):
        raise stated.refuse("divides the weights of experts by their sum, which mlx-lm's deepseek_v2 does not do")
    latent = _latent(stated, config)
    if latent["rope_scaling"] is None:  # the class wants one
        context = config["max_position_embeddings"]
        latent["rope_scaling"] = {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": context}
    grouped = routing["topk_group"] < routing["n_group"]
    return latent | routing | {"topk_method": "group_limited_greedy" if grouped else "greedy"}


def _mistral4(stated: Stated, config: Config) -> Config:
    latent = _latent(stated, config)
    if latent["rope_scaling"] is None:
        raise stated.refuse("does not scale RoPE by YaRN, which mlx-lm's mistral4 does")
    parameters = latent["rope_scaling"] | {
        "rope_theta": config["rope_theta"],
        # where it is not stated, llama.cpp does not sharpen attention at long contexts either
        "llama_4_scaling_beta": stated.real("attention.temperature_scale", 0.0),
    }
    return (
        latent
        | _by_softmax(stated)
        | {
            "rope_scaling": None,
            "rope_parameters": parameters,
            "rope_interleave": True,
            "norm_topk_prob": stated.flag("expert_weights_norm", False),
            "qk_head_dim": latent["qk_nope_head_dim"] + latent["qk_rope_head_dim"],
            "head_dim": latent["qk_nope_head_dim"] + latent["qk_rope_head_dim"],
        }
    )


def _deepseek3(stated: Stated, config: Config) -> Config:
    return after_deepseek(stated, config) | _latent(stated, config)


def _glm_dsa(stated: Stated, config: Config) -> Config:
    settings = _deepseek3(stated, config)
    key = "attention.indexer.types"
    if stated.get(key) is not None and not all(stated.each(key)):
        raise stated.refuse("has layers that share what an indexer picked, which mlx-lm's glm_moe_dsa cannot do")
    scaling = settings["rope_scaling"] or {"rope_type": "default"}
    return settings | {
        "rope_parameters": scaling | {"rope_theta": config["rope_theta"]},
        "index_n_heads": stated.whole("attention.indexer.head_count"),
        "index_head_dim": stated.whole("attention.indexer.key_length"),
        "index_topk": stated.whole("attention.indexer.top_k"),
        "indexer_rope_interleave": True,
    }


def _kimi_linear(stated: Stated, config: Config) -> Config:
    latent, routing = _latent(stated, config), after_deepseek(stated, config)
    if latent["rope_scaling"] is not None or latent["q_lora_rank"] is not None:
        raise stated.refuse("scales RoPE or compresses queries, which mlx-lm's kimi_linear does not do")
    full = [layer for layer, heads in enumerate(stated.each("attention.head_count_kv"), start=1) if heads]
    return latent | {
        "head_dim": stated.whole("kda.head_dim"),
        "linear_attn_config": {
            "full_attn_layers": full,
            "kda_layers": [layer for layer in range(1, stated.layers + 1) if layer not in full],
            "num_heads": config["num_attention_heads"],
            "head_dim": stated.whole("kda.head_dim"),
            "short_conv_kernel_size": stated.whole("ssm.conv_kernel"),
        },
        "model_max_length": config["max_position_embeddings"],
        "mla_use_nope": True,
        "num_experts": routing["n_routed_experts"],
        "num_experts_per_token": routing["num_experts_per_tok"],
        "num_shared_experts": routing["n_shared_experts"],
        "moe_intermediate_size": routing["moe_intermediate_size"],
        "moe_router_activation_func": "sigmoid",
        "moe_renormalize": stated.flag("expert_weights_norm", True),
        "routed_scaling_factor": routing["routed_scaling_factor"],
        "first_k_dense_replace": routing["first_k_dense_replace"],
        "use_grouped_topk": True,
        "num_expert_group": routing["n_group"],
        "topk_group": routing["topk_group"],
    }


_KEYS_OUT = (Stored(r"\.kv_b_proj\.weight", keys_out, ("attn_k_b.weight", "attn_v_b.weight")),)
_ABSORBED = (
    Stored(r"\.embed_q\.weight", same, ("attn_k_b.weight",)),
    Stored(r"\.unembed_out\.weight", same, ("attn_v_b.weight",)),
)

LATENT = (
    Architecture(
        "glm-dsa",
        "glm_moe_dsa",
        "GlmMoeDsaForCausalLM",
        _glm_dsa,
        mixture=True,
        own_heads=True,
        own_rope=True,
        stored=_ABSORBED,
        understands=ROUTED,
    ),
    Architecture(
        "kimi-linear",
        "kimi_linear",
        "KimiLinearForCausalLM",
        _kimi_linear,
        mixture=True,
        own_heads=True,
        own_rope=True,
        by_layer=True,
        renames=((r"\.([qkv])_conv\.conv\.", r".\1_conv1d."),),
        stored=_ABSORBED,
        understands=ROUTED,
    ),
    Architecture(
        "mistral4",
        "mistral4",
        "Mistral4ForCausalLM",
        _mistral4,
        mixture=True,
        own_heads=True,
        own_rope=True,
        stored=_ABSORBED,
        understands=(*ROUTED, "attention.temperature_scale"),
    ),
    Architecture(
        "deepseek2",
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        _deepseek3,
        mixture=True,
        only=_by_sigmoid,
        own_heads=True,
        own_rope=True,
        stored=_ABSORBED,
        understands=ROUTED,
    ),
    Architecture(
        "deepseek2",
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        _deepseek2,
        mixture=True,
        own_heads=True,
        own_rope=True,
        stored=_KEYS_OUT,
        understands=ROUTED,
    ),
)
