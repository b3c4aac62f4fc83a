"""GGUF tensors -> MLX weights: names, row orders and Gemma's norms are translated.

Which weights there are, and their shapes, is asked of mlx-lm's model class. Which tensor holds each is asked of the
`gguf` package, whose maps go from the names of the original checkpoints to llama.cpp's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import get_tensor_name_map
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from mlx_lqr.backends.checkpoint.config import model_config
from mlx_lqr.backends.mlx.family import arguments
from mlx_lqr.backends.mlx.library import model_classes
from mlx_lqr.errors import InputError, first_line

from .gguf_architectures import Architecture
from .gguf_file import GGUFFile
from .rope import FACTOR_TENSORS

# mlx-lm stacks the experts of a layer as llama.cpp does; the maps have these names for them
_STACKED = {".block_sparse_moe.": ".mlp.", ".switch_mlp.": ".experts."}
_ORDER = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"),
    *("ffn_norm", "ffn_gate_inp", "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
    *("attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm"),
)


class GGUFWeights:
    """The weights of a GGUF model under their MLX names, dequantised one by one as they are used.

    `module` is the MLX model that they are for, with no weights of its own; `shapes` maps each name to its shape;
    `load(name)` is the array in float32.

    Raises:
        InputError: a tensor is missing, unknown, or has an unexpected shape.
    """

    def __init__(self, file: GGUFFile, row: Architecture, config: dict[str, Any], dtype: str) -> None:
        self._file = file
        self._row = row
        self._config = config
        self._embedding_factor = _embedding_factor(config, dtype)
        self.module = _module(file, config)
        names = _tensor_names(self.module, row, config)
        self.shapes = {name: array.shape for name, array in _parameters(self.module, config).items()}
        self.shapes = {name: self.shapes[name] for name in sorted(self.shapes, key=lambda name: _place(names[name]))}
        self._source = {name: tensor for name, tensor in names.items() if tensor in file.tensors}
        self._check(names)

    def load(self, name: str) -> mx.array:
        """The weight `name`, as float32."""
        if name not in self._source:  # a bias that MLX requires and the file does not have: zero
            return mx.zeros(self.shapes[name])
        tensor = self._file.read(self._source[name])
        if self._row.neighbours_turn and ".q_proj." in name:
            tensor = _unpermute(tensor, self._config["num_attention_heads"])
        elif self._row.neighbours_turn and ".k_proj." in name:
            tensor = _unpermute(tensor, self._config["num_key_value_heads"])
        elif self._row.whole_norms and "norm." in name:
            if name == "model.norm.weight" and self._config["tie_word_embeddings"]:
                # the output layer has the embedding's factor as well
                tensor = np.divide(tensor, self._embedding_factor, dtype=np.float32)
            tensor = tensor - 1  # llama.cpp multiplies by the stored weight, Gemma's own norm by 1 + weight
        elif name == "model.embed_tokens.weight" and self._embedding_factor != 1:
            tensor = tensor * self._embedding_factor
        return mx.array(tensor)

    def __iter__(self) -> Iterator[tuple[str, mx.array]]:
        return ((name, self.load(name)) for name in self.shapes)

    def _check(self, names: dict[str, str]) -> None:
        path, tensors = self._file.path, self._file.tensors
        for tensor in sorted(tensors.keys() - names.values() - set(FACTOR_TENSORS)):
            raise InputError(
                f"{path} holds the tensor {tensor[:80]!r}, which this kind of model does not have: use another file"
            )
        for name, tensor in names.items():
            if tensor not in tensors:
                if not name.endswith(".bias"):
                    raise InputError(f"{path} lacks the tensor for {name}: download it again")
            elif tensors[tensor].shape != self.shapes[name]:
                shape = tensors[tensor].shape
                raise InputError(
                    f"{path} has {tensor} in the shape {shape}, not {self.shapes[name]}: download it again"
                )


def _module(file: GGUFFile, config: dict[str, Any]) -> nn.Module:
    """mlx-lm's model of this config. Its arrays are never evaluated, so it takes no memory."""
    try:
        meaning = model_config(config)
        Model, ModelArgs = model_classes(meaning.family)
        module: nn.Module = Model(ModelArgs.from_dict(arguments(meaning)))
    except (ValueError, TypeError, RuntimeError, ArithmeticError, MemoryError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{file.path} cannot be converted: {error}") from error
        raise InputError(
            f"{file.path} states sizes that no model has ({first_line(error)}): download it again"
        ) from error
    return module


def _parameters(module: nn.Module, config: dict[str, Any]) -> dict[str, mx.array]:
    parameters: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    if config["tie_word_embeddings"]:
        parameters.pop("lm_head.weight", None)  # some classes build a head all the same
    return parameters


def _tensor_names(module: nn.Module, row: Architecture, config: dict[str, Any]) -> dict[str, str]:
    """MLX name -> GGUF name of every weight.

    `model.layers.3.self_attn.q_proj.weight` is `blk.3.attn_q.weight`.
    """
    known = get_tensor_name_map(row.tensors, config["num_hidden_layers"])
    names = {}
    for name in _parameters(module, config):
        original = name
        for ours, theirs in _STACKED.items():
            original = original.replace(ours, theirs)
        tensor = known.get_name(original, try_suffixes=(".weight", ".bias"))
        if tensor is None:
            raise InputError(f"the gguf package has no name for {name} of {row.name}: update it (pip install -U gguf)")
        names[name] = tensor
    return names


def _place(tensor: str) -> tuple[int, ...]:
    """Where a tensor is written: the embedding, the blocks, the norm, the head."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor)
    if block is None:
        return (0,) if tensor.startswith("token_embd.") else (2,) if tensor.startswith("output_norm.") else (3,)
    kind = _ORDER.index(block[2]) if block[2] in _ORDER else len(_ORDER)
    return 1, int(block[1]), kind, block[3] == "bias"


def _embedding_factor(config: dict[str, Any], dtype: str) -> np.float32:
    """A factor for the embedding of a float32 Gemma 3, so that mlx-lm scales it by exactly sqrt(hidden_size).

    mlx-lm rounds that scale to bfloat16 in every dtype; transformers and llama.cpp compute it in float32 if the weights
    are float32. Uncorrected, the rounding moves logits of Gemma 3 270M by 0.6.
    """
    scale = config["hidden_size"] ** 0.5
    if config["model_type"] != "gemma3_text" or dtype != "float32":
        return np.float32(1)
    return np.float32(scale / mx.array(scale, mx.bfloat16).astype(mx.float32).item())


def _unpermute(tensor: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo the row order of llama.cpp's Llama, which rotates neighbouring rows of a head instead of its two halves."""
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    halves: NDArray[np.float32] = pairs.swapaxes(1, 2).reshape(tensor.shape)
    return halves
