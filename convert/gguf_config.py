"""GGUF metadata -> config.json, with the keys that mlx-lm and transformers read.

What the metadata does not state takes llama.cpp's defaults, since a GGUF file means what llama.cpp makes of it. What
mlx-lm's models cannot do is refused, never ignored.
"""

from __future__ import annotations

from typing import Any

from mlx_lqr.errors import InputError

from .gguf_architectures import Architecture
from .gguf_file import GGUFFile
from .rope import rope_scaling

# keys that switch on a computation that mlx-lm's models lack, and the values that leave it off
_UNSUPPORTED: dict[str, tuple[float, ...]] = {
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.causal": (True,),
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
    arch = row.name
    for key, off in _UNSUPPORTED.items():
        if file.metadata.get(f"{arch}.{key}", off[0]) not in off:
            raise InputError(f"{file.path} is a model with {arch}.{key}, which cannot be converted: use another model")

    hidden = file.value(f"{arch}.embedding_length", int)
    heads = _same_in_all_layers(file, f"{arch}.attention.head_count")
    kv_heads = _same_in_all_layers(file, f"{arch}.attention.head_count_kv", heads)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise InputError(f"{file.path} states {heads} heads over {kv_heads} key-value heads: download it again")
    head_dim = file.value(f"{arch}.attention.key_length", int, hidden // heads)
    rotated = file.value(f"{arch}.rope.dimension_count", int, head_dim)
    for key, size in (
        ("attention.value_length", file.value(f"{arch}.attention.value_length", int, head_dim)),
        ("rope.dimension_count", head_dim if row.partial_rope and 0 < rotated <= head_dim else rotated),
    ):
        if size != head_dim:
            raise InputError(
                f"{file.path} has {arch}.{key} unlike its head size {head_dim}: MLX cannot do that, use another model"
            )
    theta = file.value(f"{arch}.rope.freq_base", float, 10000.0)
    if not theta > 0:
        raise InputError(f"{file.path} states {arch}.rope.freq_base as {theta}: download it again")
    layers = file.value(f"{arch}.block_count", int)
    if layers > len(file.tensors):
        raise InputError(f"{file.path} states {layers} blocks but holds {len(file.tensors)} tensors: download it again")
    config: dict[str, Any] = {
        "architectures": [row.transformers_class],
        "model_type": row.model_type,
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
        "rope_scaling": rope_scaling(file, arch, rotated, theta),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_dropout": 0.0,
    }
    return config | row.settings(file, config)


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
