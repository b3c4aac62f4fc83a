"""Models with one feed-forward part a layer."""

from __future__ import annotations

from mlx_lqr.convert.architectures.layouts import by_heads, interleaved, same
from mlx_lqr.convert.architectures.row import FULL, SLIDING, Architecture, Config, Stated, Stored, layer_types

NO_WINDOW: Config = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 0, "layer_types": None}
_SMOLLM3_PERIOD = 4  # llama.cpp's own constant; the metadata does not have it
_COHERE2_PERIOD = 4  # likewise


def rotated_part(stated: Stated, config: Config) -> float:
    """The share of each head that RoPE turns."""
    return float(stated.whole("rope.dimension_count", config["head_dim"]) / config["head_dim"])


def llama(stated: Stated, config: Config) -> Config:
    names = stated.file.tensors
    return {
        "hidden_act": "silu",
        "attention_bias": any(".attn_" in name and name.endswith(".bias") for name in names),
        "mlp_bias": any(".ffn_" in name and name.endswith(".bias") for name in names),
    }


def _smollm3(stated: Stated, config: Config) -> Config:
    return llama(stated, config) | {
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
        "no_rope_layers": [int((index + 1) % _SMOLLM3_PERIOD != 0) for index in range(stated.layers)],
        "no_rope_layer_interval": _SMOLLM3_PERIOD,
    }


def _ministral3(stated: Stated, config: Config) -> Config:
    scaling = config["rope_scaling"]
    if scaling is None or scaling.get("rope_type") != "yarn":
        raise stated.refuse("does not scale RoPE by YaRN, which mlx-lm's ministral3 does")
    parameters = scaling | {
        "rope_theta": config["rope_theta"],
        "mscale": 1.0,
        "mscale_all_dim": stated.real("rope.scaling.yarn_log_multiplier", 0.0),
        "llama_4_scaling_beta": stated.real("attention.temperature_scale"),
    }
    return {"rope_parameters": parameters, "layer_types": None, "sliding_window": None}


def _qwen2(stated: Stated, config: Config) -> Config:
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise stated.refuse(f"has heads of {config['head_dim']}: mlx-lm's qwen2 cannot do that")
    return {"hidden_act": "silu", **NO_WINDOW}


def qwen3(stated: Stated, config: Config) -> Config:
    return {"hidden_act": "silu", "attention_bias": False, **NO_WINDOW}


def _phi3(stated: Stated, config: Config) -> Config:
    return {
        "hidden_act": "silu",
        "original_max_position_embeddings": stated.whole(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
        "partial_rotary_factor": rotated_part(stated, config),
        "sliding_window": stated.whole("attention.sliding_window", 0) or None,
    }


def _phi2(stated: Stated, config: Config) -> Config:
    return {"partial_rotary_factor": rotated_part(stated, config), "layer_norm_eps": config["norm_eps"]}


def _olmo2(stated: Stated, config: Config) -> Config:
    return {"hidden_act": "silu", "attention_bias": False}


def _slides(stated: Stated) -> bool:
    return stated.whole("attention.sliding_window", 0) > 0


def _olmo3(stated: Stated, config: Config) -> Config:
    return {
        "attention_bias": False,
        "sliding_window": stated.whole("attention.sliding_window"),
        "layer_types": layer_types(stated, 4),
    }


def _glm4(stated: Stated, config: Config) -> Config:
    return {
        "attention_bias": stated.holds(".attn_q.bias"),
        "partial_rotary_factor": rotated_part(stated, config),
        "rope_traditional": True,
    }


def _granite(stated: Stated, config: Config) -> Config:
    return granite_scales(stated, config) | {
        "attention_bias": stated.holds(".attn_q.bias"),
        "mlp_bias": stated.holds(".ffn_up.bias"),
    }


def granite_scales(stated: Stated, config: Config) -> Config:
    return {
        "attention_multiplier": stated.real("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": stated.real("embedding_scale", 1.0),
        "residual_multiplier": stated.real("residual_scale", 1.0),
        "logits_scaling": stated.real("logit_scale", 1.0),
    }


GRANITE_SCALES = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")


def _ernie(stated: Stated, config: Config) -> Config:
    return {"use_bias": stated.holds(".ffn_up.bias")}


def _nemotron(stated: Stated, config: Config) -> Config:
    return {
        "hidden_act": "relu2",
        "norm_eps": config["norm_eps"],
        "attention_bias": stated.holds(".attn_q.bias"),
        "mlp_bias": stated.holds(".ffn_up.bias"),
        "partial_rotary_factor": rotated_part(stated, config),
    }


def _exaone4(stated: Stated, config: Config) -> Config:
    window = stated.whole("attention.sliding_window", 0)
    pattern = "".join("L" if kind == SLIDING else "G" for kind in layer_types(stated, 4)) if window else None
    return {"sliding_window": window or None, "sliding_window_pattern": pattern}


def _hunyuan(stated: Stated, config: Config) -> Config:
    return {"attention_bias": stated.holds(".attn_q.bias"), "use_qk_norm": stated.holds(".attn_q_norm.")}


def _seed_oss(stated: Stated, config: Config) -> Config:
    return {
        "attention_bias": stated.holds(".attn_q.bias"),
        "attention_out_bias": stated.holds(".attn_output.bias"),
        "mlp_bias": stated.holds(".ffn_up.bias"),
    }


def _cohere(stated: Stated, config: Config) -> Config:
    return {
        "layer_norm_eps": config["norm_eps"],
        "layer_norm_bias": stated.holds("norm.bias"),
        "logit_scale": stated.real("logit_scale"),
        "attention_bias": stated.holds(".attn_q.bias"),
        "use_qk_norm": stated.holds(".attn_q_norm."),
    }


def _cohere2(stated: Stated, config: Config) -> Config:
    kinds = layer_types(stated, _COHERE2_PERIOD)
    period = kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1
    if kinds != [SLIDING if (index + 1) % period else FULL for index in range(stated.layers)]:
        raise stated.refuse("has an irregular order of sliding layers, which mlx-lm's cohere2 cannot do")
    return _cohere(stated, config) | {
        "sliding_window": stated.whole("attention.sliding_window"),
        "sliding_window_pattern": period,
    }


def _stablelm(stated: Stated, config: Config) -> Config:
    return {
        "layer_norm_eps": config["norm_eps"],
        "use_qkv_bias": stated.holds(".attn_q.bias"),
        "partial_rotary_factor": rotated_part(stated, config),
        "use_parallel_residual": not stated.holds(".ffn_norm."),
        "qk_layernorm": stated.holds(".attn_q_norm."),
    }


def _starcoder2(stated: Stated, config: Config) -> Config:
    return {"norm_epsilon": config["norm_eps"]}


def _gpt2(stated: Stated, config: Config) -> Config:
    context = config["max_position_embeddings"]
    return {
        "n_embd": config["hidden_size"],
        "n_layer": stated.layers,
        "n_head": config["num_attention_heads"],
        "n_inner": config["intermediate_size"],
        "n_positions": context,
        "n_ctx": context,
        "layer_norm_epsilon": config["norm_eps"],
        "multi_query": config["num_key_value_heads"] == 1,
        "attention_bias": stated.holds(".attn_qkv.bias"),
        "mlp_bias": stated.holds(".ffn_up.bias"),
    }


def _gpt_neox(stated: Stated, config: Config) -> Config:
    return {
        "layer_norm_eps": config["norm_eps"],
        "rotary_emb_base": config["rope_theta"],
        "rotary_pct": rotated_part(stated, config),
        "use_parallel_residual": stated.flag("use_parallel_residual"),
    }


def _exaone(stated: Stated, config: Config) -> Config:
    return {
        "num_layers": stated.layers,
        "layer_norm_epsilon": config["rms_norm_eps"],
        "attention_bias": stated.holds(".attn_q.bias"),
        "mlp_bias": stated.holds(".ffn_up.bias"),
    }


def _minicpm(stated: Stated, config: Config) -> Config:
    return {
        "scale_emb": stated.real("embedding_scale"),
        "scale_depth": stated.real("residual_scale") * float(stated.layers**0.5),
        "dim_model_base": config["hidden_size"] / stated.real("logit_scale"),
    }


def _internlm2(stated: Stated, config: Config) -> Config:
    return {"bias": stated.holds(".attn_q.bias")}


def _apertus(stated: Stated, config: Config) -> Config:
    return {
        "mlp_bias": stated.holds(".ffn_up.bias"),
        "attention_bias": stated.holds(".attn_q.bias"),
        "post_norm": False,
        "qk_norm": stated.holds(".attn_q_norm."),
    }


_XIELU = tuple(
    Stored(rf"\.act_fn\.{name}", same, metadata=f"xielu.{name}") for name in ("alpha_p", "alpha_n", "beta", "eps")
)

_WQKV = (
    Stored(r"\.wqkv\.weight", interleaved, ("attn_q.weight", "attn_k.weight", "attn_v.weight")),
    Stored(r"\.wqkv\.bias", interleaved, ("attn_q.bias", "attn_k.bias", "attn_v.bias")),
)

DENSE = (
    Architecture("llama", "llama", "LlamaForCausalLM", llama, neighbours_turn=True),
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", _qwen2),
    Architecture("qwen2vl", "qwen2", "Qwen2ForCausalLM", _qwen2),  # the text of it
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", qwen3),
    Architecture("qwen3vl", "qwen3", "Qwen3ForCausalLM", qwen3),
    Architecture("phi2", "phi", "PhiForCausalLM", _phi2, partial_rope=True),
    Architecture("phi3", "phi3", "Phi3ForCausalLM", _phi3, partial_rope=True),
    Architecture("olmo2", "olmo3", "Olmo3ForCausalLM", _olmo3, only=_slides),
    Architecture("olmo2", "olmo2", "Olmo2ForCausalLM", _olmo2),
    Architecture("smollm3", "smollm3", "SmolLM3ForCausalLM", _smollm3, neighbours_turn=True),
    Architecture(
        "mistral3",
        "ministral3",
        "Ministral3ForCausalLM",
        _ministral3,
        neighbours_turn=True,
        understands=("attention.temperature_scale",),
    ),
    Architecture("glm4", "glm4", "Glm4ForCausalLM", _glm4, partial_rope=True),
    Architecture(
        "granite", "granite", "GraniteForCausalLM", _granite, neighbours_turn=True, understands=GRANITE_SCALES
    ),
    Architecture("ernie4_5", "ernie4_5", "Ernie4_5ForCausalLM", _ernie),
    Architecture("nemotron", "nemotron", "NemotronForCausalLM", _nemotron, partial_rope=True, whole_norms=True),
    Architecture("exaone4", "exaone4", "Exaone4ForCausalLM", _exaone4),
    Architecture("hunyuan-dense", "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", _hunyuan),
    Architecture("seed_oss", "seed_oss", "SeedOssForCausalLM", _seed_oss),
    Architecture("command-r", "cohere", "CohereForCausalLM", _cohere, understands=("logit_scale",)),
    Architecture("cohere2", "cohere2", "Cohere2ForCausalLM", _cohere2, understands=("logit_scale",)),
    Architecture("stablelm", "stablelm", "StableLmForCausalLM", _stablelm, partial_rope=True),
    Architecture("starcoder2", "starcoder2", "Starcoder2ForCausalLM", _starcoder2),
    Architecture("starcoder", "gpt_bigcode", "GPTBigCodeForCausalLM", _gpt2),
    Architecture("gpt2", "gpt2", "GPT2LMHeadModel", _gpt2, renames=((r"^model\.", "transformer."),)),
    Architecture(
        "gptneox",
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _gpt_neox,
        partial_rope=True,
        stored=(Stored(r"\.query_key_value\.(?:weight|bias)", by_heads),),
        renames=(
            (r"^model\.embed_out", "embed_out"),
            (r"^model\.h\.", "gpt_neox.layers."),
            (r"^model\.", "gpt_neox."),
        ),
    ),
    Architecture("internlm2", "internlm2", "InternLM2ForCausalLM", _internlm2, stored=_WQKV),
    Architecture("exaone", "exaone", "ExaoneForCausalLM", _exaone),
    Architecture(
        "minicpm",
        "minicpm",
        "MiniCPMForCausalLM",
        _minicpm,
        neighbours_turn=True,
        understands=("embedding_scale", "residual_scale", "logit_scale"),
    ),
    Architecture("apertus", "apertus", "ApertusForCausalLM", _apertus, stored=_XIELU),
)
