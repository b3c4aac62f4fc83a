"""GGUF tensors -> MLX weights: names, row orders and Gemma's norms are translated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_lqr.errors import InputError

from .gguf_file import GGUFFile
from .rope import FACTORS

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCK_OF = {
    "llama": _BLOCK,
    "qwen2": _BLOCK,
    "qwen3": _BLOCK | _QK_NORMS,
    "gemma2": _BLOCK | _SANDWICH_NORMS,
    "gemma3": _BLOCK | _QK_NORMS | _SANDWICH_NORMS,
}


class GGUFWeights:
    """The weights of a GGUF model under their MLX names, dequantised one by one as they are used.

    `shapes` maps each name to its shape; `load(name)` is the array in float32.

    Raises:
        InputError: a tensor is missing, unknown, or has an unexpected shape.
    """

    def __init__(self, file: GGUFFile, arch: str, config: dict[str, Any], dtype: str) -> None:
        self._file = file
        self._embedding_factor = _embedding_factor(arch, config, dtype)
        self._arch = arch
        self._config = config
        self.shapes = _expected_shapes(arch, config)
        self._source = {_mlx_name(arch, name): name for name in file.tensors if name != FACTORS}
        self._check()

    def load(self, name: str) -> mx.array:
        """The weight `name`, as float32."""
        if name not in self._source:  # a bias that MLX requires and the file does not have: zero
            return mx.zeros(self.shapes[name])
        tensor = self._file.read(self._source[name])
        if self._arch == "llama" and ".q_proj." in name:
            tensor = _unpermute(tensor, self._config["num_attention_heads"])
        elif self._arch == "llama" and ".k_proj." in name:
            tensor = _unpermute(tensor, self._config["num_key_value_heads"])
        elif self._arch.startswith("gemma") and "norm." in name:
            if name == "model.norm.weight" and self._config["tie_word_embeddings"]:
                # the output layer has the embedding's factor as well
                tensor = np.divide(tensor, self._embedding_factor, dtype=np.float32)
            tensor = tensor - 1  # llama.cpp multiplies by the stored weight, Gemma's own norm by 1 + weight
        elif name == "model.embed_tokens.weight" and self._embedding_factor != 1:
            tensor = tensor * self._embedding_factor
        return mx.array(tensor)

    def __iter__(self) -> Iterator[tuple[str, mx.array]]:
        return ((name, self.load(name)) for name in self.shapes)

    def _check(self) -> None:
        path = self._file.path
        for name, source in self._source.items():
            if name not in self.shapes:
                raise InputError(
                    f"{path} holds the tensor {source[:80]!r}, which this kind of model does not have: use another file"
                )
            shape = self._file.tensors[source].shape
            if shape != self.shapes[name]:
                raise InputError(
                    f"{path} has {source} in the shape {shape}, not {self.shapes[name]}: download it again"
                )
        for name in self.shapes:
            if name not in self._source and not name.endswith(".bias"):
                raise InputError(f"{path} lacks the tensor for {name}: download it again")


def _embedding_factor(arch: str, config: dict[str, Any], dtype: str) -> np.float32:
    """A factor for the embedding of a float32 Gemma 3, so that mlx-lm scales it by exactly sqrt(hidden_size).

    mlx-lm rounds that scale to bfloat16 in every dtype; transformers and llama.cpp compute it in float32 if the weights
    are float32. Uncorrected, the rounding moves logits of Gemma 3 270M by 0.6.
    """
    scale = config["hidden_size"] ** 0.5
    if arch != "gemma3" or dtype != "float32":
        return np.float32(1)
    return np.float32(scale / mx.array(scale, mx.bfloat16).astype(mx.float32).item())


def _mlx_name(arch: str, name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names are kept, for `_check`."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in _TOP:
        return f"{_TOP[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _BLOCK_OF[arch]:
        return f"model.layers.{parts[1]}.{_BLOCK_OF[arch][parts[2]]}.{parts[3]}"
    return name


def _expected_shapes(arch: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the MLX model, in the order they are written."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    linear = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    block: dict[str, tuple[int, ...]] = {}
    for module in _BLOCK_OF[arch].values():
        if module in linear:
            block[f"{module}.weight"] = linear[module]
            if _has_bias(arch, module, config):
                block[f"{module}.bias"] = linear[module][:1]
        else:
            block[f"{module}.weight"] = (head_dim if module.startswith("self_attn.") else hidden,)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _has_bias(arch: str, module: str, config: dict[str, Any]) -> bool:
    if arch == "llama":
        return bool(config["attention_bias"] if module.startswith("self_attn.") else config["mlp_bias"])
    return arch == "qwen2" and module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _unpermute(tensor: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo the row order of llama.cpp's Llama, which rotates neighbouring rows of a head instead of its two halves."""
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    halves: NDArray[np.float32] = pairs.swapaxes(1, 2).reshape(tensor.shape)
    return halves
