"""Whether the weights of a folder are those of a model with its config.json, by their names and rows.

Libraries go by the config alone: a layer too few, and the rest of the weights is left aside without a word. Rows are
looked at and columns are not, since quantisation packs them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_lqr.backends.checkpoint.config import ModelConfig
from mlx_lqr.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]


def check_shapes(folder: Path, config: ModelConfig, shapes: Shapes) -> None:
    """Raise `InputError` where the weights are others than the config says; the line names its key."""
    wrong = (
        _other_rows(config.settings, shapes)
        or _other_biases(config.settings, shapes)
        or _other_layers(config.settings, shapes)
        or _no_head(config.settings, shapes)
    )
    if wrong:
        raise InputError(f"the weights in {folder} do not fit its config.json: {wrong}")


def _other_rows(said: dict[str, Any], shapes: Shapes) -> str | None:
    heads, groups, size = (said[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    experts = _count_of_experts(said)
    inner = ("intermediate_size", said["intermediate_size"])
    mixture = (experts, said.get(experts))
    expected = {
        "model.embed_tokens": ("vocab_size", said["vocab_size"]),
        "lm_head": ("vocab_size", said["vocab_size"]),
        "model.norm": ("hidden_size", said["hidden_size"]),
        "self_attn.q_proj": ("num_attention_heads x head_dim", heads * size),
        "self_attn.k_proj": ("num_key_value_heads x head_dim", groups * size),
        "self_attn.qkv_proj": ("(num_attention_heads + 2 num_key_value_heads) x head_dim", (heads + 2 * groups) * size),
        "mlp.gate_proj": inner,
        "mlp.gate_up_proj": ("2 x intermediate_size", 2 * said["intermediate_size"]),
        "block_sparse_moe.gate": mixture,
        "mlp.gate": mixture,
        "N.w1": inner,
        "N.gate_proj": ("moe_intermediate_size", said.get("moe_intermediate_size")),
    }
    for name, shape in shapes.items():
        part = ".".join(re.sub(r"\.\d+\.", ".N.", name).removesuffix(".weight").split(".")[-2:])
        keys, rows = expected.get(part, ("", None))
        if name.endswith(".weight") and rows is not None and shape and shape[0] != rows:
            return f"{name} has {shape[0]} rows, but {keys} is {rows}"
    return None


def _other_biases(said: dict[str, Any], shapes: Shapes) -> str | None:
    for key, part in (("attention_bias", "self_attn"), ("mlp_bias", "mlp")):
        biased = [name for name in shapes if f".{part}." in name and name.endswith("_proj.bias")]
        if key in said and said[key] != bool(biased):
            what = f"have {biased[0]}" if biased else f"have no biases in {part}"
            return f"they {what}, but {key} is {json.dumps(said[key])}"
    return None


def _other_layers(said: dict[str, Any], shapes: Shapes) -> str | None:
    count = said["num_hidden_layers"]
    layers = {int(match[1]) for name in shapes if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    if layers and layers != set(range(count)):
        return f"they have {max(layers) + 1} layers, but num_hidden_layers is {count}"
    if layers and "decoder_sparse_step" in said:
        step, dense, experts = said["decoder_sparse_step"], said["mlp_only_layers"], said["num_experts"]
        mixing = [k for k in range(count) if experts and k not in dense and (k + 1) % step == 0]
        mixed = sorted({int(name.split(".")[2]) for name in shapes if ".experts." in name or ".switch_mlp." in name})
        if mixed != mixing:
            return (
                f"the layers with experts are {mixed}, but num_experts {experts}, decoder_sparse_step {step} and "
                f"mlp_only_layers {dense} say {mixing}"
            )
    return None


def _no_head(said: dict[str, Any], shapes: Shapes) -> str | None:
    if said["tie_word_embeddings"] or any(name.startswith("lm_head.") for name in shapes):
        return None
    return "tie_word_embeddings is false or left out, but there is no lm_head: set it to true if the embeddings are it"


def _count_of_experts(said: dict[str, Any]) -> str:
    return "num_experts" if "num_experts" in said else "num_local_experts"
