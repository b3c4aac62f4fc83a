"""Google's Gemma family."""

from __future__ import annotations

import math

import numpy as np

from mlx_lqr.convert.architectures.layouts import same
from mlx_lqr.convert.architectures.row import (
    FULL,
    SLIDING,
    Architecture,
    Config,
    Make,
    Stated,
    Stored,
    experts,
    layer_types,
)
from mlx_lqr.convert.rope import FACTORS
from mlx_lqr.errors import InputError

_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62
_SWITCHED_OFF = 1e20  # a factor of RoPE so large that the frequency does not turn


def _only_tied(stated: Stated, config: Config, family: str) -> None:
    if config["rope_scaling"] is not None or not config["tie_word_embeddings"]:
        raise stated.refuse(f"is a {family} with scaled RoPE or its own output layer: mlx-lm has neither")


def _query_scalar(config: Config, layers_of_27b: int) -> int:
    """Gemma scales queries by its head size, except the 27B models, known by their layers here as in llama.cpp."""
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _gemma(stated: Stated, config: Config) -> Config:
    _only_tied(stated, config, "Gemma")
    return {"hidden_act": "gelu_pytorch_tanh", "attention_bias": False}


def _alternating(layers: int, period: int) -> list[str]:
    """Every `period`-th layer has full attention, the others a sliding window."""
    return [SLIDING if (index + 1) % period else FULL for index in range(layers)]


def _gemma2(stated: Stated, config: Config) -> Config:
    _only_tied(stated, config, "Gemma 2")
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar(config, _GEMMA2_27B_LAYERS),
        "sliding_window": stated.whole("attention.sliding_window", 4096),
        "layer_types": _alternating(stated.layers, 2),
        "attn_logit_softcapping": stated.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": stated.real("final_logit_softcapping", 30.0),
        "attention_bias": False,
    }


def _gemma3(stated: Stated, config: Config) -> Config:
    if stated.real("final_logit_softcapping", 0.0):
        raise stated.refuse("caps its final logits, which mlx-lm's gemma3_text does not do")
    window = stated.whole("attention.sliding_window", 0)
    period = _period(stated) if window else 1
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar(config, _GEMMA3_27B_LAYERS),
        "sliding_window": window or config["max_position_embeddings"],
        "sliding_window_pattern": period,
        "layer_types": _alternating(stated.layers, period),
        "rope_local_base_freq": stated.real("rope.freq_base_swa", 10000.0),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": False,
    }


def _period(stated: Stated) -> int:
    """Gemma 3's period; the metadata has it as a number, or as a flag per layer (True: sliding window)."""
    pattern = stated.get("attention.sliding_window_pattern")
    if not isinstance(pattern, list):
        return stated.whole("attention.sliding_window_pattern", 6)
    period = pattern.index(False) + 1 if False in pattern else len(pattern) + 1
    if [bool((index + 1) % period) for index in range(stated.layers)] != pattern:
        raise stated.refuse("has an irregular order of sliding layers: mlx-lm cannot do that")
    return period


def _gemma3n(stated: Stated, config: Config) -> Config:
    if config["rope_scaling"] is not None or not config["tie_word_embeddings"]:
        raise stated.refuse("is a Gemma 3n with scaled RoPE or its own output layer: mlx-lm has neither")
    scales = stated.each("activation_sparsity_scale")
    return {
        "num_kv_shared_layers": stated.whole("attention.shared_kv_layers"),
        "vocab_size_per_layer_input": _rows(stated, "per_layer_token_embd.weight"),
        "hidden_size_per_layer_input": stated.whole("embedding_length_per_layer_input"),
        "sliding_window": stated.whole("attention.sliding_window"),
        "rope_local_base_freq": stated.real("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": stated.real("final_logit_softcapping", 30.0),
        "layer_types": layer_types(stated, 5),
        # llama.cpp stores the quantile of the normal distribution, the config the probability
        "activation_sparsity_pattern": [round(0.5 * math.erfc(-scale / math.sqrt(2)), 6) for scale in scales],
        "altup_num_inputs": stated.whole("altup.num_inputs"),
        "altup_active_idx": stated.whole("altup.active_idx"),
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "laurel_rank": _rows(stated, "blk.0.laurel_l.weight"),
    }


def _rows(stated: Stated, tensor: str) -> int:
    if tensor not in stated.file.tensors:
        raise InputError(f"{stated.file.path} lacks the tensor {tensor}: download it again")
    return stated.file.tensors[tensor].shape[0]


def _gemma4(stated: Stated, config: Config) -> Config:
    kinds = layer_types(stated)
    heads = dict(zip(kinds, stated.each("attention.head_count_kv"), strict=True))
    widths = stated.each("feed_forward_length")
    shared = stated.whole("attention.shared_kv_layers", 0)
    inner = stated.whole("embedding_length_per_layer_input", 0)
    own_keys = [layer for layer in range(stated.layers - shared) if kinds[layer] == FULL]
    return {
        "head_dim": stated.whole("attention.key_length_swa"),
        "global_head_dim": stated.whole("attention.key_length"),
        "num_key_value_heads": heads.get(SLIDING, heads.get(FULL)),
        "num_global_key_value_heads": heads.get(FULL),
        "attention_k_eq_v": any(f"blk.{layer}.attn_v.weight" not in stated.file.tensors for layer in own_keys),
        "intermediate_size": min(widths),
        "use_double_wide_mlp": max(widths) > min(widths),
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": inner,
        "vocab_size_per_layer_input": _rows(stated, "per_layer_token_embd.weight") if inner else config["vocab_size"],
        "sliding_window": stated.whole("attention.sliding_window"),
        "layer_types": kinds,
        "final_logit_softcapping": stated.real("final_logit_softcapping", 30.0),
        "rope_parameters": _gemma4_rope(stated, config),
        **_gemma4_experts(stated),
    }


def _gemma4_experts(stated: Stated) -> Config:
    mixture = stated.whole("expert_count", 0) > 0
    count, used = experts(stated) if mixture else (None, None)
    return {
        "enable_moe_block": mixture,
        "num_experts": count,
        "top_k_experts": used,
        "moe_intermediate_size": stated.whole("expert_feed_forward_length") if mixture else None,
    }


def _gemma4_rope(stated: Stated, config: Config) -> Config:
    sliding = stated.whole("attention.key_length_swa")
    if stated.whole("rope.dimension_count_swa", sliding) != sliding:
        raise stated.refuse(
            "turns a part of each head alone in layers that slide, which mlx-lm's gemma4_text cannot do"
        )
    return {
        FULL: {
            "rope_type": "proportional",
            "rope_theta": config["rope_theta"],
            "partial_rotary_factor": _turning(stated, stated.whole("attention.key_length")),
        },
        SLIDING: {"rope_type": "default", "rope_theta": stated.real("rope.freq_base_swa", 10000.0)},
    }


def _turning(stated: Stated, head_dim: int) -> float:
    """The share of a head's frequencies that turn in layers of full attention: the others have a huge factor."""
    if FACTORS not in stated.file.tensors:
        raise InputError(f"{stated.file.path} lacks the tensor {FACTORS}: download it again")
    factors = stated.file.read(FACTORS).ravel()
    turning = int((factors < _SWITCHED_OFF).sum())
    if factors.shape != (head_dim // 2,) or not (factors[:turning] == 1).all():
        raise InputError(f"{FACTORS} does not hold {head_dim // 2} factors of a Gemma 4: download the model again")
    return turning / len(factors)


def _layer_of(index: int) -> Make:
    return lambda parts, config: np.ascontiguousarray(parts[0][index])


_GEMMA3N = (
    *(
        Stored(rf"\.altup_{ours}\.{index}\.weight", _layer_of(index), (f"{theirs}.weight",))
        for ours, theirs in (("projections", "altup_proj"), ("unembed_projections", "altup_unembd_proj"))
        for index in range(3)
    ),
    Stored(r"\.altup\.correct_output_scale", same, ("altup_correct_scale.weight",)),
)
_GEMMA4 = (
    Stored(r"\.layer_scalar", same, ("layer_output_scale.weight",)),
    Stored(r"\.router\.proj\.weight", same, ("ffn_gate_inp.weight",)),
    Stored(r"\.router\.scale", same, ("ffn_gate_inp.scale",)),
    Stored(r"\.router\.per_expert_scale", same, ("ffn_down_exps.scale",)),
    Stored(r"\.switch_glu\.gate_proj\.weight", same, ("ffn_gate_exps.weight",)),
    Stored(r"\.switch_glu\.up_proj\.weight", same, ("ffn_up_exps.weight",)),
    Stored(r"\.switch_glu\.down_proj\.weight", same, ("ffn_down_exps.weight",)),
)

GEMMA = (
    Architecture("gemma", "gemma", "GemmaForCausalLM", _gemma, whole_norms=True),
    Architecture("gemma2", "gemma2", "Gemma2ForCausalLM", _gemma2, whole_norms=True),
    Architecture("gemma3", "gemma3_text", "Gemma3ForCausalLM", _gemma3, whole_norms=True),
    Architecture(
        "gemma3n",
        "gemma3n",
        "Gemma3nForConditionalGeneration",
        _gemma3n,
        stored=_GEMMA3N,
        by_layer=True,
        nested="gemma3n_text",
    ),
    Architecture(
        "gemma4",
        "gemma4_text",
        "Gemma4ForCausalLM",
        _gemma4,
        mixture=None,
        stored=_GEMMA4,
        own_heads=True,
        own_rope=True,
        by_layer=True,
        unused=(r"\.attn_(?:k|v|k_norm)\.weight",),  # of layers that share the keys and values of others
    ),
)
