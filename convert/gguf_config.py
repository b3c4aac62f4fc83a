"""GGUF metadata -> config.json, with the keys that mlx-lm and transformers read.

What the metadata does not state takes llama.cpp's defaults, since a GGUF file means what llama.cpp makes of it. What
mlx-lm's models cannot do is refused, never ignored.
"""

from __future__ import annotations

from typing import Any

from mlx_lqr.errors import InputError, first_line

from .architectures import Architecture, Stated
from .gguf_file import GGUFFile
from .rope import rope_scaling

# keys that switch on a computation that most of mlx-lm's models lack, and the values that leave it off
_UNSUPPORTED: dict[str, tuple[float, ...]] = {
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.causal": (True,),
    "attention.temperature_scale": (0.0,),
    "embedding_scale": (0.0,),
    "residual_scale": (0.0,),
    "logit_scale": (0.0,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),  # none stated, or softmax
    "expert_shared_count": (0,),
    "leading_dense_block_count": (0,),
}


def model_config(file: GGUFFile, row: Architecture) -> dict[str, Any]:
    """The config of the model in `file`, without dtype and end tokens.

    Raises:
        InputError: a value is missing, or MLX cannot do what it asks for.
    """
    arch, stated = row.name, Stated(file)
    for key, off in _UNSUPPORTED.items():
        if key not in row.understands and file.metadata.get(f"{arch}.{key}", off[0]) not in off:
            raise InputError(f"{file.path} is a model with {arch}.{key}, which cannot be converted: use another model")
    theta = stated.real("rope.freq_base", 10000.0)
    if not theta > 0:
        raise InputError(f"{file.path} states {arch}.rope.freq_base as {theta}: download it again")
    layer_norm = stated.get("attention.layer_norm_epsilon")
    rms = f"{arch}.attention.layer_norm_rms_epsilon"
    config: dict[str, Any] = {
        "architectures": [row.transformers_class],
        "model_type": row.model_type,
        "vocab_size": _vocabulary_rows(file),
        "hidden_size": stated.size("embedding_length"),
        "intermediate_size": _size(stated, row, "feed_forward_length"),
        "num_hidden_layers": stated.layers,
        **(_own_heads(stated) if row.own_heads else _heads(stated, row)),
        "rms_norm_eps": file.value(rms, float, layer_norm),
        "max_position_embeddings": stated.size("context_length"),
        "rope_theta": theta,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_dropout": 0.0,
    }
    rotated = stated.whole("rope.dimension_count", config.get("head_dim", 0))
    config["rope_scaling"] = None if row.own_rope else rope_scaling(file, arch, rotated, theta)
    norm = {"norm_eps": stated.real("attention.layer_norm_epsilon", config["rms_norm_eps"])}
    return config | _own_settings(stated, row, config | norm)


def _own_settings(stated: Stated, row: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    try:
        return row.settings(stated, config)
    except (ValueError, TypeError, ArithmeticError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{stated.file.path} states sizes that no model has ({first_line(error)}): download it again"
        ) from error


def _heads(stated: Stated, row: Architecture) -> dict[str, int]:
    """How many heads of which size; the usual case, where all have one size and RoPE turns them whole."""
    file, arch = stated.file, stated.arch
    heads = _size(stated, row, "attention.head_count")
    kv_heads = _size(stated, row, "attention.head_count_kv", heads)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise InputError(f"{file.path} states {heads} heads over {kv_heads} key-value heads: download it again")
    head_dim = stated.whole("attention.key_length", stated.size("embedding_length") // heads)
    rotated = stated.whole("rope.dimension_count", head_dim)
    for key, size in (
        ("attention.value_length", stated.whole("attention.value_length", head_dim)),
        ("rope.dimension_count", head_dim if row.partial_rope and 0 < rotated <= head_dim else rotated),
    ):
        if size != head_dim:
            raise InputError(
                f"{file.path} has {arch}.{key} unlike its head size {head_dim}: MLX cannot do that, use another model"
            )
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}


def _own_heads(stated: Stated) -> dict[str, int]:
    heads = stated.whole("attention.head_count")
    return {"num_attention_heads": heads} if heads else {}


def _size(stated: Stated, row: Architecture, key: str, default: int | None = None) -> int:
    """An integer that some files state once and others for each layer."""
    value = stated.get(key)
    if isinstance(value, list) and not row.by_layer and any(item != value[0] for item in value):
        raise InputError(
            f"{stated.file.path} states a different {stated.arch}.{key} for each layer, which cannot be converted: "
            "use another model"
        )
    return stated.whole(key, default)


def _vocabulary_rows(file: GGUFFile) -> int:
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path} has no tensor token_embd.weight, so it is not a whole model: download it again")
    return file.tensors["token_embd.weight"].shape[0]
