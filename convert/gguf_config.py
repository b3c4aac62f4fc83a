"""GGUF metadata -> config.json, with the keys that mlx-lm and transformers read.

What the metadata does not state takes llama.cpp's defaults, since a GGUF file means what llama.cpp makes of it. What
mlx-lm's models cannot do is refused, never ignored.
"""

from __future__ import annotations

from typing import Any

from mlx_lqr.errors import InputError

from .gguf_file import GGUFFile
from .rope import rope_scaling

# GGUF architecture -> (model_type, class of transformers)
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
# keys that switch on a computation that mlx-lm's models lack, and the value that leaves it off
_UNSUPPORTED = {
    "expert_count": 0,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.causal": True,
    "embedding_scale": 0.0,
    "residual_scale": 0.0,
    "logit_scale": 0.0,
}
_NO_WINDOW = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 0, "layer_types": None}
_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62


def model_config(file: GGUFFile) -> dict[str, Any]:
    """The config of the model in `file`, without dtype and end tokens.

    Raises:
        InputError: the architecture is not supported, a value is missing, or MLX cannot do what it asks for.
    """
    arch = architecture(file)
    for key, off in _UNSUPPORTED.items():
        if file.metadata.get(f"{arch}.{key}", off) != off:
            what = "a mixture of experts" if key == "expert_count" else f"a model with {arch}.{key}"
            raise InputError(f"{file.path} is {what}, which cannot be converted: use another model")

    hidden = file.value(f"{arch}.embedding_length", int)
    heads = _same_in_all_layers(file, f"{arch}.attention.head_count")
    kv_heads = _same_in_all_layers(file, f"{arch}.attention.head_count_kv", heads)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise InputError(f"{file.path} states {heads} heads over {kv_heads} key-value heads: download it again")
    head_dim = file.value(f"{arch}.attention.key_length", int, hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.value(f"{arch}.{key}", int, head_dim) != head_dim:
            raise InputError(
                f"{file.path} has {arch}.{key} unlike its head size {head_dim}: MLX cannot do that, use another model"
            )
    theta = file.value(f"{arch}.rope.freq_base", float, 10000.0)
    if not theta > 0:
        raise InputError(f"{file.path} states {arch}.rope.freq_base as {theta}: download it again")
    layers = file.value(f"{arch}.block_count", int)
    if layers > len(file.tensors):
        raise InputError(f"{file.path} states {layers} blocks but holds {len(file.tensors)} tensors: download it again")
    model_type, transformers_class = ARCHITECTURES[arch]
    config: dict[str, Any] = {
        "architectures": [transformers_class],
        "model_type": model_type,
        "vocab_size": _vocabulary_rows(file),
        "hidden_size": hidden,
        "intermediate_size": _same_in_all_layers(file, f"{arch}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": file.value(f"{arch}.attention.layer_norm_rms_epsilon", float),
        "max_position_embeddings": file.value(f"{arch}.context_length", int),
        "rope_theta": theta,
        "rope_scaling": rope_scaling(file, arch, head_dim, theta),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_dropout": 0.0,
    }
    return config | _SPECIFIC[arch](file, config)


def architecture(file: GGUFFile) -> str:
    """The architecture that `file` states, if it is a supported one."""
    arch = file.value("general.architecture", str)
    if arch not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise InputError(
            f"{file.path} has the architecture {arch!r}, which cannot be converted: supported are {supported}"
        )
    return arch


def _llama(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "attention_bias": any(".attn_" in name and name.endswith(".bias") for name in file.tensors),
        "mlp_bias": any(".ffn_" in name and name.endswith(".bias") for name in file.tensors),
    }


def _qwen2(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise InputError(
            f"{file.path} has heads of {config['head_dim']}: mlx-lm's qwen2 cannot do that, use another model"
        )
    return {"hidden_act": "silu"} | _NO_WINDOW


def _qwen3(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "silu", "attention_bias": False} | _NO_WINDOW


def _gemma2(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    if config["rope_scaling"] is not None or not config["tie_word_embeddings"]:
        raise InputError(
            f"{file.path} is a Gemma 2 with scaled RoPE or its own output layer: mlx-lm has neither, use another model"
        )
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar(config, _GEMMA2_27B_LAYERS),
        "sliding_window": file.value("gemma2.attention.sliding_window", int, 4096),
        "layer_types": _layer_types(config["num_hidden_layers"], 2),
        "attn_logit_softcapping": file.value("gemma2.attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": file.value("gemma2.final_logit_softcapping", float, 30.0),
        "attention_bias": False,
    }


def _gemma3(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    if file.value("gemma3.final_logit_softcapping", float, 0.0):
        raise InputError(
            f"{file.path} caps its final logits, which mlx-lm's gemma3_text does not do: use another model"
        )
    window = file.value("gemma3.attention.sliding_window", int, 0)
    period = _sliding_period(file, config["num_hidden_layers"]) if window else 1
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar(config, _GEMMA3_27B_LAYERS),
        "sliding_window": window or config["max_position_embeddings"],
        "sliding_window_pattern": period,
        "layer_types": _layer_types(config["num_hidden_layers"], period),
        "rope_local_base_freq": file.value("gemma3.rope.freq_base_swa", float, 10000.0),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": False,
    }


_SPECIFIC = {"llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "gemma2": _gemma2, "gemma3": _gemma3}


def _query_scalar(config: dict[str, Any], layers_of_27b: int) -> int:
    """Gemma scales queries by its head size, except the 27B models, known by their layers here as in llama.cpp."""
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _layer_types(layers: int, period: int) -> list[str]:
    """Every `period`-th layer has full attention, the others a sliding window."""
    return ["sliding_attention" if (index + 1) % period else "full_attention" for index in range(layers)]


def _sliding_period(file: GGUFFile, layers: int) -> int:
    """Gemma 3's period; the metadata has it as a number, or as a flag per layer (True: sliding window)."""
    pattern = file.metadata.get("gemma3.attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        period = pattern.index(False) + 1 if False in pattern else len(pattern) + 1
        if [bool((index + 1) % period) for index in range(layers)] != pattern:
            raise InputError(
                f"{file.path} has an irregular order of sliding layers: mlx-lm cannot do that, use another model"
            )
        return period
    return file.value("gemma3.attention.sliding_window_pattern", int, 6)


def _same_in_all_layers(file: GGUFFile, key: str, default: int | None = None) -> int:
    """An integer that some files state once and others for each layer."""
    value = file.metadata.get(key)
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        file.metadata[key] = value[0]
    elif isinstance(value, list):
        raise InputError(
            f"{file.path} states a different {key} for each layer, which cannot be converted: use another model"
        )
    return file.value(key, int, default)


def _vocabulary_rows(file: GGUFFile) -> int:
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path} has no tensor token_embd.weight, so it is not a whole model: download it again")
    return file.tensors["token_embd.weight"].shape[0]
