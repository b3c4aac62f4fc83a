"""GGUF tensors -> MLX weights: names, row orders and norms are translated.

Which weights there are, and their shapes, is asked of mlx-lm's model class. Which tensor holds each is asked of the
`gguf` package, whose maps go from the names of the original checkpoints to llama.cpp's, and of the architecture's row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import get_tensor_name_map
from numpy.typing import NDArray

from mlx_lqr.errors import InputError

from .architectures import Architecture, Stated
from .architectures.layouts import COMMON, STACKED, unpermute
from .architectures.row import Make
from .gguf_file import GGUFFile
from .gguf_module import built, parameters
from .rope import FACTOR_TENSORS

_BLOCK = re.compile(r"\.(?:layers|h)\.(\d+)\.")
_ORDER = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"),
    *("ffn_norm", "ffn_gate_inp", "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
    *("attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm"),
)


@dataclass(frozen=True)
class _Source:
    """Where a weight comes from: tensors of the file, and what makes them the weight; or values of the metadata.

    `rows`: where it is a part of the tensor, the rows (first, last) that it has there.
    """

    tensors: tuple[str, ...]
    make: Make | None = None
    rows: tuple[int, int] | None = None
    value: float | None = None


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
        self._stated = Stated(file)
        self._config = config
        self._embedding_factor = _embedding_factor(config, dtype)
        self.module = built(file, row, config)
        known = get_tensor_name_map(row.tensors, self._stated.layers)
        shapes = {name: array.shape for name, array in parameters(self.module, row, config).items()}
        self._sources = {name: self._source(name, shape, known) for name, shape in shapes.items()}
        self.shapes = {name: shapes[name] for name in sorted(shapes, key=lambda name: _place(self._sources[name]))}
        self._check()

    def load(self, name: str) -> mx.array:
        """The weight `name`, as float32."""
        source = self._sources[name]
        if source.value is not None:
            return mx.array(source.value)
        if source.tensors[0] not in self._file.tensors:  # a bias that MLX requires and the file does not have: zero
            return mx.zeros(self.shapes[name])
        parts = [self._file.read(tensor) for tensor in source.tensors]
        try:
            tensor = source.make(parts, self._config) if source.make is not None else parts[0]
            if source.rows is not None:
                tensor = tensor[..., slice(*source.rows), :] if tensor.ndim > 1 else tensor[slice(*source.rows)]
            tensor = self._in_order(name, tensor).reshape(self.shapes[name])
        except (ValueError, IndexError) as error:
            if isinstance(error, InputError):
                raise
            raise self._unlike(source.tensors[0], self.shapes[name]) from error
        return mx.array(tensor)

    def __iter__(self) -> Iterator[tuple[str, mx.array]]:
        return ((name, self.load(name)) for name in self.shapes)

    def _in_order(self, name: str, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._row.neighbours_turn and ".q_proj." in name:
            return unpermute(tensor, self._config["num_attention_heads"])
        if self._row.neighbours_turn and ".k_proj." in name:
            return unpermute(tensor, self._config["num_key_value_heads"])
        if self._row.whole_norms and name.endswith("norm.weight"):
            if name == "model.norm.weight" and self._config["tie_word_embeddings"]:
                # the output layer has the embedding's factor as well
                tensor = np.divide(tensor, self._embedding_factor, dtype=np.float32)
            return tensor - 1  # llama.cpp multiplies by the stored weight, the model's own norm by 1 + weight
        if name == "model.embed_tokens.weight" and self._embedding_factor != 1:
            return tensor * self._embedding_factor
        return tensor

    def _source(self, name: str, shape: tuple[int, ...], known: Any) -> _Source:
        block = _BLOCK.search(name)
        rule = next((rule for rule in (*self._row.stored, *COMMON) if re.search(rule.name + "$", name)), None)
        if rule is not None and rule.metadata is not None and block is not None:
            return _Source((), value=float(self._stated.each(rule.metadata)[int(block[1])]))
        make = None if rule is None else rule.make
        if rule is not None and rule.tensors:
            place = "" if block is None else f"blk.{block[1]}."
            return self._stored(_Source(tuple(place + tensor for tensor in rule.tensors), make), shape)
        return self._stored(_Source((self._mapped(name, known),), make), shape)

    def _mapped(self, name: str, known: Any) -> str:
        """`model.layers.3.self_attn.q_proj.weight` is `blk.3.attn_q.weight`."""
        original = name.removeprefix("language_model.").replace("model.language_model.", "model.")
        for pattern, replacement in self._row.renames:
            original = re.sub(pattern, replacement, original)
        tried = [original]
        if re.search(STACKED, original):
            tried = [re.sub(STACKED, f".{part}.experts.", original) for part in ("mlp", "block_sparse_moe", "mixer")]
        for candidate in tried:
            tensor: str | None = known.get_name(candidate, try_suffixes=(".weight", ".bias"))
            if tensor is not None:
                return tensor
        raise InputError(
            f"the gguf package has no name for {name} of {self._row.name}: update it (pip install -U gguf)"
        )

    def _stored(self, source: _Source, shape: tuple[int, ...]) -> _Source:
        """`source`, or where the file has it instead."""
        tensors = self._file.tensors
        first = source.tensors[0]
        if all(tensor in tensors for tensor in source.tensors):
            return source
        if first == "output.weight" and "token_embd.weight" in tensors:  # one for both, in a class with a head
            return _Source(("token_embd.weight",))
        if first.removesuffix(".weight") in tensors:
            return _Source((first.removesuffix(".weight"),), source.make)
        fused = re.fullmatch(r"(blk\.\d+\.)(attn_[qkv]|ffn_(?:gate|up)_exps)(\.\w+)", first)
        if fused is None:
            return source
        whole = "attn_qkv" if fused[2].startswith("attn") else "ffn_gate_up_exps"
        name = f"{fused[1]}{whole}{fused[3]}"
        if name not in tensors or len(tensors[name].shape) != len(shape):
            return source
        axis = -1 if fused[3] == ".bias" else -2
        total, rows = tensors[name].shape[axis], shape[axis]
        start = {"attn_k": total - 2 * rows, "attn_v": total - rows, "ffn_up_exps": total - rows}.get(fused[2], 0)
        return _Source((name,), source.make, (start, start + rows))

    def _check(self) -> None:
        path, tensors = self._file.path, self._file.tensors
        used = {tensor for source in self._sources.values() for tensor in source.tensors}
        for tensor in sorted(tensors.keys() - used - set(FACTOR_TENSORS)):
            block = re.match(r"blk\.(\d+)\.", tensor)
            beyond = block is not None and self._stated.layers <= int(block[1]) < self._stated.blocks
            if not beyond and not any(re.search(pattern, tensor) for pattern in self._row.unused):
                raise InputError(
                    f"{path} holds the tensor {tensor[:80]!r}, which this kind of model does not have: use another file"
                )
        for name, source in self._sources.items():
            for tensor in source.tensors:
                if tensor not in tensors and not tensor.endswith(".bias"):
                    raise InputError(f"{path} lacks the tensor for {name}: download it again")
            as_it_is = source.make is None and source.rows is None and source.value is None
            if as_it_is and source.tensors[0] in tensors:
                stored = tensors[source.tensors[0]].shape
                if _squeezed(stored) != _squeezed(self.shapes[name]):
                    raise self._unlike(source.tensors[0], self.shapes[name])

    def _unlike(self, tensor: str, shape: tuple[int, ...]) -> InputError:
        stored = self._file.tensors[tensor].shape
        return InputError(f"{self._file.path} has {tensor} in the shape {stored}, not {shape}: download it again")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """llama.cpp leaves lengths of 1 out, or has more of them."""
    return tuple(length for length in shape if length != 1)


def _place(source: _Source) -> tuple[int, ...]:
    """Where a weight is written: the embedding, the blocks, the norm, the head."""
    tensor = source.tensors[0] if source.tensors else ""
    block = re.fullmatch(r"blk\.(\d+)\.([\w.]+?)(?:\.(weight|bias))?", tensor)
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
