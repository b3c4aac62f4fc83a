"""Models with a state that is carried from token to token, or short convolutions, between or beside attention."""

from __future__ import annotations

from mlx_lqr.convert.architectures.dense import GRANITE_SCALES, granite_scales
from mlx_lqr.convert.architectures.layouts import flat, joined
from mlx_lqr.convert.architectures.mixtures import ROUTED
from mlx_lqr.convert.architectures.row import (
    SIGMOID,
    Architecture,
    Config,
    Stated,
    Stored,
    experts,
    groups,
    routed_by,
)

_UNBOUNDED = 1e30  # JSON has no infinity; llama.cpp does not limit time steps at all


def _lfm2(stated: Stated, config: Config) -> Config:
    kinds = ["full_attention" if heads else "conv" for heads in stated.each("attention.head_count_kv")]
    return {
        "norm_eps": config["rms_norm_eps"],
        "conv_bias": stated.holds(".shortconv.conv.bias"),
        "conv_L_cache": stated.whole("shortconv.l_cache"),
        "block_dim": config["hidden_size"],
        "block_ff_dim": config["intermediate_size"],
        "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "layer_types": kinds,
        "full_attn_idxs": [layer for layer, kind in enumerate(kinds) if kind == "full_attention"],
    }


def _lfm2_moe(stated: Stated, config: Config) -> Config:
    count, used = experts(stated)
    routed_by(stated, SIGMOID, absent=SIGMOID)
    return _lfm2(stated, config) | {
        "num_experts": count,
        "num_experts_per_tok": used,
        "moe_intermediate_size": stated.whole("expert_feed_forward_length"),
        "num_dense_layers": stated.whole("leading_dense_block_count"),
        "norm_topk_prob": True,
        "use_expert_bias": stated.holds(".exp_probs_b."),
        "routed_scaling_factor": stated.real("expert_weights_scale", 1.0),
    }


def _mamba(stated: Stated, config: Config) -> Config:
    return {
        "intermediate_size": stated.whole("ssm.inner_size"),
        "state_size": stated.whole("ssm.state_size"),
        "conv_kernel": stated.whole("ssm.conv_kernel"),
        "time_step_rank": stated.whole("ssm.time_step_rank"),
        "use_bias": stated.holds(".ssm_in.bias"),
        "use_conv_bias": stated.holds(".ssm_conv1d.bias"),
        "use_bcdt_rms": stated.flag("ssm.dt_b_c_rms", False),
        "mixer_rms_eps": config["rms_norm_eps"],
    }


def _state_space(stated: Stated) -> Config:
    """Mamba 2's sizes, in the names of most hybrids."""
    inner, heads = stated.whole("ssm.inner_size"), stated.whole("ssm.time_step_rank")
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": inner // max(heads, 1),
        "mamba_d_state": stated.whole("ssm.state_size"),
        "mamba_d_conv": stated.whole("ssm.conv_kernel"),
        "mamba_n_groups": stated.whole("ssm.group_count"),
        "mamba_conv_bias": stated.holds(".ssm_conv1d.bias"),
        "mamba_proj_bias": stated.holds(".ssm_in.bias"),
        "mamba_d_ssm": inner,
        "mamba_expand": inner // stated.size("embedding_length"),
    }


def _one_group(stated: Stated, family: str) -> None:
    if stated.whole("ssm.group_count") != 1:
        raise stated.refuse(f"norms the state by groups, which mlx-lm's {family} does not do")


def _mamba2(stated: Stated, config: Config) -> Config:
    _one_group(stated, "mamba2")
    sizes = _state_space(stated)
    return {
        "num_heads": sizes["mamba_n_heads"],
        "head_dim": sizes["mamba_d_head"],
        "intermediate_size": sizes["mamba_d_ssm"],
        "state_size": sizes["mamba_d_state"],
        "conv_kernel": sizes["mamba_d_conv"],
        "n_groups": sizes["mamba_n_groups"],
        "layer_norm_epsilon": config["rms_norm_eps"],
        "use_bias": sizes["mamba_proj_bias"],
        "use_conv_bias": sizes["mamba_conv_bias"],
        "time_step_limit": [0.0, _UNBOUNDED],
        "time_step_rank": "auto",
    }


def _jamba(stated: Stated, config: Config) -> Config:
    if stated.whole("expert_count", 0) > 1:
        raise stated.refuse("has experts, whose weights mlx-lm's jamba divides by their sum and Jamba does not")
    return {
        "attn_layer_offset": 0,
        "attn_layer_period": 1,
        "layers_block_type": ["attention" if heads else "mamba" for heads in stated.each("attention.head_count_kv")],
        "expert_layer_offset": 0,
        "expert_layer_period": 1,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "mamba_d_conv": stated.whole("ssm.conv_kernel"),
        "mamba_d_state": stated.whole("ssm.state_size"),
        "mamba_expand": stated.whole("ssm.inner_size") // config["hidden_size"],
        "mamba_dt_rank": stated.whole("ssm.time_step_rank"),
        "mamba_proj_bias": stated.holds(".ssm_in.bias"),
        "mamba_conv_bias": stated.holds(".ssm_conv1d.bias"),
    }


def _granite_hybrid(stated: Stated, config: Config) -> Config:
    _one_group(stated, "granitemoehybrid")
    mixture = stated.whole("expert_count", 0) > 0
    count, used = experts(stated) if mixture else (0, 0)
    kinds = ["attention" if heads else "mamba" for heads in stated.each("attention.head_count_kv")]
    turns = stated.flag("rope.scaling.finetuned", True)  # llama.cpp's switch for all of RoPE here
    return (
        granite_scales(stated, config)
        | _state_space(stated)
        | {
            "layer_types": kinds,
            "attention_bias": stated.holds(".attn_q.bias"),
            "mlp_bias": False,
            "num_local_experts": count,
            "num_experts_per_tok": used,
            "shared_intermediate_size": stated.whole("expert_shared_feed_forward_length", config["intermediate_size"]),
            "position_embedding_type": "rope" if turns else "nope",
            "time_step_limit": [0.0, _UNBOUNDED],
        }
    )


def _falcon_h1(stated: Stated, config: Config) -> Config:
    if stated.holds(".ssm_norm."):
        _one_group(stated, "falcon_h1")
    ones = ("attention_in", "attention_out", "embedding", "key", "lm_head", "ssm_in", "ssm_out")
    return (
        _state_space(stated)
        | {f"{name}_multiplier": 1.0 for name in ones}
        | {  # they are in the weights
            "mlp_multipliers": [1.0, 1.0],
            "ssm_multipliers": [1.0] * 5,
            "attention_bias": stated.holds(".attn_q.bias"),
            "mlp_bias": stated.holds(".ffn_up.bias"),
            "projectors_bias": stated.holds(".ssm_out.bias"),
            "mamba_rms_norm": stated.holds(".ssm_norm."),
            "mamba_norm_before_gate": False,
        }
    )


def _nemotron_h(stated: Stated, config: Config) -> Config:
    kinds = _nemotron_layers(stated)
    sizes = _state_space(stated)
    settings = {
        "hybrid_override_pattern": kinds,
        "mamba_num_heads": sizes["mamba_n_heads"],
        "mamba_head_dim": sizes["mamba_d_head"],
        "mamba_proj_bias": sizes["mamba_proj_bias"],
        "ssm_state_size": sizes["mamba_d_state"],
        "conv_kernel": sizes["mamba_d_conv"],
        "n_groups": sizes["mamba_n_groups"],
        "attention_bias": stated.holds(".attn_q.bias"),
        "mlp_bias": stated.holds(".ffn_up.bias"),
        "use_bias": sizes["mamba_proj_bias"],
        "use_conv_bias": sizes["mamba_conv_bias"],
        "layer_norm_epsilon": config["rms_norm_eps"],
        "time_step_limit": [0.0, _UNBOUNDED],
    }
    if "E" not in kinds:
        return settings
    count, used = experts(stated)
    routed_by(stated, SIGMOID, absent=SIGMOID)
    return (
        settings
        | groups(stated)
        | {
            "n_routed_experts": count,
            "num_experts_per_tok": used,
            "n_shared_experts": stated.whole("expert_shared_count"),
            "moe_intermediate_size": stated.whole("expert_feed_forward_length"),
            "moe_shared_expert_intermediate_size": stated.whole("expert_shared_feed_forward_length"),
            "moe_latent_size": stated.whole("moe_latent_size", 0) or None,
            "norm_topk_prob": stated.flag("expert_weights_norm", False),
            "routed_scaling_factor": stated.real("expert_weights_scale", 1.0),
        }
    )


def _nemotron_layers(stated: Stated) -> list[str]:
    """What each layer is, by the one tensor that only its kind has."""
    signs = {"ssm_in": "M", "attn_q": "*", "ffn_gate_inp": "E", "ffn_up": "-"}
    kinds = []
    for layer in range(stated.layers):
        found = [sign for part, sign in signs.items() if f"blk.{layer}.{part}.weight" in stated.file.tensors]
        if len(found) != 1:
            raise stated.refuse(f"has a layer {layer} that is not of one kind, which mlx-lm's nemotron_h cannot do")
        kinds += found
    return kinds


_NORM = Stored(r"\.(?:mamba|mixer)\.norm\.weight", flat)
_GRANITE_SHARED = Stored(
    r"\.shared_mlp\.input_linear\.weight", joined, ("ffn_gate_shexp.weight", "ffn_up_shexp.weight")
)
_NEMOTRON_NAMES = (
    (r"^backbone\.(.*)\.mixer\.switch_mlp\.fc1\.", r"model.\1.mlp.experts.up_proj."),
    (r"^backbone\.(.*)\.mixer\.switch_mlp\.fc2\.", r"model.\1.mlp.experts.down_proj."),
)

RECURRENT = (
    Architecture("lfm2", "lfm2", "Lfm2ForCausalLM", _lfm2, by_layer=True),
    Architecture(
        "lfm2moe", "lfm2_moe", "Lfm2MoeForCausalLM", _lfm2_moe, mixture=True, by_layer=True, understands=ROUTED
    ),
    Architecture("mamba", "mamba", "MambaForCausalLM", _mamba, own_heads=True),
    Architecture("mamba2", "mamba2", "Mamba2ForCausalLM", _mamba2, own_heads=True, stored=(_NORM,)),
    Architecture("jamba", "jamba", "JambaForCausalLM", _jamba, mixture=None, by_layer=True),
    Architecture(
        "granitehybrid",
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        _granite_hybrid,
        mixture=None,
        neighbours_turn=True,
        by_layer=True,
        stored=(_NORM, _GRANITE_SHARED),
        understands=GRANITE_SCALES,
    ),
    Architecture("falcon-h1", "falcon_h1", "FalconH1ForCausalLM", _falcon_h1, stored=(_NORM,)),
    Architecture(
        "nemotron_h",
        "nemotron_h",
        "NemotronHForCausalLM",
        _nemotron_h,
        by_layer=True,
        partial_rope=True,
        stored=(_NORM,),
        renames=_NEMOTRON_NAMES,
    ),
    Architecture(
        "nemotron_h_moe",
        "nemotron_h",
        "NemotronHForCausalLM",
        _nemotron_h,
        mixture=True,
        by_layer=True,
        partial_rope=True,
        stored=(_NORM,),
        renames=_NEMOTRON_NAMES,
        understands=ROUTED,
    ),
)
