"""Tiny random models: a transformers model, and the GGUF file that llama.cpp's converter would make of it.

The reference never passes through the code under test. Weights are quantised row by row in the order that transformers
has them, the reference keeps what the blocks dequantise to, and the file gets the same blocks with their rows in the
order of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from transformers import AutoConfig, AutoModelForCausalLM

BYTES = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]  # GPT-2's alphabet
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld"]
TOKENS = [*CONTROL, *BYTES, *(merge.replace(" ", "") for merge in MERGES)]
VOCABULARY = len(TOKENS)

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_SANDWICH_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# sizes are chosen so that the defaults which transformers' GGUF loader leaves in place are right
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_theta": 5e4},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6},
    "qwen3": {"model_type": "qwen3", "rope_theta": 1e6, "head_dim": 128, "num_attention_heads": 2},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_theta": 1e4,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 8,
        "num_hidden_layers": 7,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"],
    },
}
# with a setting of its own wherever the family has one
FURTHER: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "rope_theta": 1e6, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3moe": {
        "model_type": "qwen3_moe",
        "rope_theta": 1e6,
        "head_dim": 32,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "gemma": {
        "model_type": "gemma",
        "rope_theta": 1e4,
        "head_dim": 32,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "phi3": {"model_type": "phi3", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "pad_token_id": 0},
    "olmo2": {"model_type": "olmo2", "rope_theta": 5e5},
    "smollm3": {
        "model_type": "smollm3",
        "rope_theta": 2e6,
        "num_hidden_layers": 5,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    },
}
_WRITTEN_AS = {"mixtral": "llama"}
_SANDWICHED = ("gemma2", "gemma3", "olmo2")
_NEIGHBOURS_TURN = ("llama", "mixtral", "smollm3")
K_SIZES = {"hidden_size": 256, "intermediate_size": 256}  # a block of a K-quant holds 256 values


@dataclass
class Tiny:
    """A GGUF file, and the transformers model with the weights that its blocks dequantise to."""

    path: Path
    reference: Any


def logits(model: Any, tokens: list[int]) -> np.ndarray:
    """A transformers model's logits, (tokens, vocabulary)."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


def reference_model(arch: str, seed: int = 0, **changes: Any) -> Any:
    """A transformers model of `arch` with random weights large enough that a mistake shows."""
    settings = _BASE | (ARCHITECTURES | FURTHER)[arch] | changes
    config = AutoConfig.for_model(**settings)
    config._attn_implementation = "eager"  # Gemma 2's soft caps need it
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        scale = 0.3 if "norm" in name else 0.15
        parameter.data = torch.randn_like(parameter) * scale + ("norm" in name and "gemma" not in arch)
    return model


def write(
    path: Path,
    arch: str,
    kind: Kind = Kind.F32,
    *,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    tokenizer: dict[str, Any] | None = None,
    seed: int = 0,
    **changes: Any,
) -> Tiny:
    """Write a tiny model of `arch`, its matrices as `kind`.

    Args:
        metadata: keys to add or (None) leave out; their types are guessed from the values.
        tensors: float32 tensors to add.
        tokenizer: metadata under tokenizer.ggml. in place of the usual.
        changes: settings of the transformers config.
    """
    model = reference_model(arch, seed, **changes)
    config = model.config
    keys = _metadata(arch, config) | (tokenizer or tokenizer_keys()) | (metadata or {})
    writer = GGUFWriter(path, _WRITTEN_AS.get(arch, arch))
    for key, value in keys.items():
        if value is not None:
            add_key(writer, key, value)
    names = _NAMES | (_SANDWICH_NAMES if arch in _SANDWICHED else {})
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        weight = parameter.data.numpy()
        if parameter.ndim == 3:
            parameter.data = torch.from_numpy(_add_experts(writer, name, weight, kind, rng))
        elif parameter.ndim == 2 and not name.endswith("mlp.gate.weight"):  # llama.cpp keeps routers in float32
            blocks, plain = random_blocks(weight.shape, kind, rng) if "_K" in kind.name else _blocks(weight, kind)
            parameter.data = torch.from_numpy(plain)
            writer.add_tensor(_gguf_name(name, names), _permuted(blocks, name, arch, config), raw_dtype=kind)
        else:
            stored = weight + 1 if arch.startswith("gemma") else weight
            writer.add_tensor(_gguf_name(name, names), _permuted(stored, name, arch, config))
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Tiny(path, model)


def random_blocks(shape: tuple[int, ...], kind: Kind, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random K-quant blocks (the gguf package cannot quantise to these) and the weights they stand for.

    `shape` is that of the weights, and the last dimension is the one in blocks.
    """
    from gguf.constants import GGML_QUANT_SIZES

    size, nbytes = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // size, nbytes), dtype=np.uint8)
    scales = {Kind.Q4_K: {0: 2e-3, 2: 1e-2}, Kind.Q5_K: {0: 1e-3, 2: 1e-2}, Kind.Q6_K: {208: 1e-4}}[kind]
    for offset, scale in scales.items():  # where the block keeps its float16 scales
        blocks[..., offset : offset + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    blocks = blocks.reshape(*shape[:-1], -1)
    return blocks, dequantize(blocks, kind)


def _blocks(weight: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    blocks = quantize(weight, kind)
    return blocks, np.ascontiguousarray(dequantize(blocks, kind), np.float32)


def _add_experts(writer: GGUFWriter, name: str, weight: np.ndarray, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """Write the stacked experts of a layer, (experts, rows, columns), and return what their blocks stand for.

    transformers has gates and ups in one array, llama.cpp in two.
    """
    place, _, part = name.rpartition(".")
    halves = {"gate_proj": 0, "up_proj": 1} if part == "gate_up_proj" else {part: 0}
    plains = []
    for module, rows in zip(halves, np.split(weight, len(halves), axis=1), strict=True):
        blocks, plain = random_blocks(rows.shape, kind, rng) if "_K" in kind.name else _blocks(rows, kind)
        writer.add_tensor(_gguf_name(f"{place}.{module}.weight", _NAMES), blocks, raw_dtype=kind)
        plains.append(plain)
    return np.concatenate(plains, axis=1)


def _permuted(rows: np.ndarray, name: str, arch: str, config: Any) -> np.ndarray:
    """llama.cpp's LlamaModel.permute, on whole rows."""
    if arch not in _NEIGHBOURS_TURN or (".q_proj." not in name and ".k_proj." not in name):
        return rows
    heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
    shape = rows.shape
    halves = rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(shape))


def _gguf_name(name: str, names: dict[str, str]) -> str:
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in top or name == "lm_head.weight":
        return top.get(name, "output.weight")
    _, _, layer, rest = name.split(".", 3)
    module, suffix = rest.rsplit(".", 1)
    return f"blk.{layer}.{names[module]}.{suffix}"


def _metadata(arch: str, config: Any) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": (ARCHITECTURES | FURTHER)[arch]["rope_theta"],
    }
    if arch != "qwen2" and getattr(config, "head_dim", None):
        keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if arch == "llama":
        keys["rope.dimension_count"] = config.head_dim
    if arch == "phi3":
        keys["rope.dimension_count"] = int(config.hidden_size / config.num_attention_heads * 0.75)
        keys["rope.scaling.original_context_length"] = config.original_max_position_embeddings
        keys["attention.sliding_window"] = config.sliding_window or 0
    if arch == "mixtral":
        keys |= {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}
    if arch == "qwen3moe":
        keys |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        keys["expert_feed_forward_length"] = config.moe_intermediate_size
    if arch == "gemma2":
        keys |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if arch in ("gemma2", "gemma3"):
        keys["attention.sliding_window"] = config.sliding_window
    return {f"{_WRITTEN_AS.get(arch, arch)}.{key}": value for key, value in keys.items()}


def tokenizer_keys() -> dict[str, Any]:
    """Metadata of a byte-level tokenizer with a few merges."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (VOCABULARY - len(CONTROL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


def add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add metadata; its type is guessed from the value."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)
