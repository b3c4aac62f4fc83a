"""Mixtures whose layers with a window have heads and rotations of their own."""

from __future__ import annotations

import numpy as np

from mlx_lqr.convert.architectures.layouts import same
from mlx_lqr.convert.architectures.mixtures import ROUTED
from mlx_lqr.convert.architectures.row import (
    FULL,
    SIGMOID,
    SLIDING,
    Architecture,
    Config,
    Stated,
    Stored,
    experts,
    groups,
    layer_types,
    routed_by,
)
from mlx_lqr.convert.rope import FACTORS, recover_llama3

_STEP_ROTATED = 0.5  # llama.cpp's own constant: the share of a head that turns in layers of full attention


def _by_kind(stated: Stated, key: str, kinds: list[str]) -> dict[str, int]:
    """A number of each kind of layer, which is to be the same for all of a kind."""
    numbers = dict(zip(kinds, stated.each(key), strict=True))
    if [numbers[kind] for kind in kinds] != stated.each(key):
        raise stated.refuse(f"states a {stated.arch}.{key} that differs among layers of one kind")
    return {kind: int(numbers.get(kind, next(iter(numbers.values())))) for kind in (FULL, SLIDING)}


def _mimo2(stated: Stated, config: Config) -> Config:
    count, used = experts(stated)
    routed_by(stated, SIGMOID, absent=SIGMOID)
    kinds = layer_types(stated)
    kv_heads = _by_kind(stated, "attention.head_count_kv", kinds)
    keys, values = stated.whole("attention.key_length"), stated.whole("attention.value_length")
    tensors = stated.file.tensors
    sinks = {kind for layer, kind in enumerate(kinds) if f"blk.{layer}.attn_sinks.weight" in tensors}
    return groups(stated) | {
        "n_routed_experts": count,
        "num_experts_per_tok": used,
        "n_shared_experts": None,
        "moe_intermediate_size": stated.whole("expert_feed_forward_length"),
        "moe_layer_freq": [int(f"blk.{layer}.ffn_gate_inp.weight" in tensors) for layer in range(stated.layers)],
        "routed_scaling_factor": stated.real("expert_weights_scale", 1.0),
        "norm_topk_prob": stated.flag("expert_weights_norm", True),
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "hybrid_layer_pattern": [int(kind == SLIDING) for kind in kinds],
        "sliding_window_size": stated.whole("attention.sliding_window"),
        "add_swa_attention_sink_bias": SLIDING in sinks,
        "add_full_attention_sink_bias": FULL in sinks,
        "attention_value_scale": stated.real("attention.value_scale", 1.0),
        "head_dim": keys,
        "v_head_dim": values,
        "num_key_value_heads": kv_heads[FULL],
        "swa_head_dim": keys,
        "swa_v_head_dim": values,
        "swa_num_attention_heads": config["num_attention_heads"],
        "swa_num_key_value_heads": kv_heads[SLIDING],
        "swa_rope_theta": stated.real("rope.freq_base_swa"),
        "partial_rotary_factor": stated.whole("rope.dimension_count") / max(keys, 1),
        "layernorm_epsilon": config["rms_norm_eps"],
    }


def _step35(stated: Stated, config: Config) -> Config:
    count, used = experts(stated)
    routed_by(stated, SIGMOID, absent=SIGMOID)
    kinds = layer_types(stated)
    heads = _by_kind(stated, "attention.head_count", kinds)
    kv_heads = _by_kind(stated, "attention.head_count_kv", kinds)
    head_dim, theta = stated.whole("attention.key_length"), config["rope_theta"]
    thetas = {FULL: theta, SLIDING: stated.real("rope.freq_base_swa")}
    scaling = None
    if FACTORS in stated.file.tensors:  # padded with ones to all of a head
        turning = int(head_dim * _STEP_ROTATED)
        scaling = recover_llama3(stated.file.read(FACTORS).ravel()[: turning // 2], turning, theta)
    mixed = [str(layer) for layer in range(stated.layers) if f"blk.{layer}.ffn_gate_inp.weight" in stated.file.tensors]
    return {
        "num_attention_heads": heads[FULL],
        "num_key_value_heads": kv_heads[FULL],
        "num_attention_groups": kv_heads[FULL],
        "head_dim": head_dim,
        "attention_other_setting": {"num_attention_heads": heads[SLIDING], "num_attention_groups": kv_heads[SLIDING]},
        "layer_types": kinds,
        "sliding_window": stated.whole("attention.sliding_window"),
        "rope_theta": [thetas[kind] for kind in kinds],
        "rope_scaling": scaling,
        "yarn_only_types": [FULL],
        "partial_rotary_factors": [_STEP_ROTATED if kind == FULL else 1.0 for kind in kinds],
        "use_head_wise_attn_gate": stated.holds(".attn_gate."),
        "moe_num_experts": count,
        "moe_top_k": used,
        "moe_intermediate_size": stated.whole("expert_feed_forward_length"),
        "share_expert_dim": stated.whole("expert_shared_feed_forward_length"),
        "moe_layers_enum": ",".join(mixed),
        "moe_router_scaling_factor": stated.real("expert_weights_scale", 1.0),
        "norm_expert_weight": stated.flag("expert_weights_norm", False),
        "swiglu_limits": _limits(stated, "swiglu_clamp_exp"),
        "swiglu_limits_shared": _limits(stated, "swiglu_clamp_shexp"),
    }


def _limits(stated: Stated, key: str) -> list[float] | None:
    """Where activations of each layer are clamped; 0 is nowhere."""
    if stated.get(key) is None:
        return None
    return [float(str(np.float32(value))) for value in stated.each(key)]


WINDOWS = (
    Architecture(
        "mimo2",
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        _mimo2,
        mixture=True,
        own_heads=True,
        by_layer=True,
        stored=(Stored(r"\.attention_sink_bias", same, ("attn_sinks.weight",)),),
        understands=ROUTED,
    ),
    Architecture(
        "step35",
        "step3p5",
        "Step3p5ForCausalLM",
        _step35,
        mixture=True,
        own_heads=True,
        own_rope=True,
        by_layer=True,
        stored=(
            Stored(r"\.mlp\.gate\.gate\.weight", same, ("ffn_gate_inp.weight",)),
            Stored(r"\.router_bias", same, ("exp_probs_b.bias",)),
            Stored(r"\.g_proj\.weight", same, ("attn_gate.weight",)),
        ),
        renames=((r"\.mlp\.share_expert\.", ".share_expert."),),
        understands=ROUTED,
    ),
)
