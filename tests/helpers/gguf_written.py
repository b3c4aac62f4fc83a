"""Write an mlx-lm model as the GGUF file that llama.cpp's converter makes of the checkpoint it stands for.

This goes the converter's way, from the names and layouts of published checkpoints to llama.cpp's, and shares nothing
with `convert/`, which goes back. Layouts are those of the converter's classes, named in the functions.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGUFWriter, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache

from helpers.gguf_cases import Case
from helpers.tiny_gguf import add_key, tokenizer_keys

Weight = tuple[str, np.ndarray]
Store = Callable[[str, np.ndarray, Case], Iterable[Weight]]


def model_of(case: Case, *, seed: int = 0, **changes: Any) -> nn.Module:
    """Random weights, large enough for every part to matter."""
    architecture: Any = importlib.import_module(f"mlx_lm.models.{case.model_type}")
    settings = case.settings | changes
    config = {"model_type": case.model_type, "text_config": settings} if case.nested else settings
    mx.random.seed(seed)
    module: nn.Module = architecture.Model(architecture.ModelArgs.from_dict(config))

    def draw(name: str, weight: mx.array) -> mx.array:
        noise = mx.random.normal(weight.shape)
        if name.endswith("A_log"):
            return mx.abs(noise) * 0.5
        if weight.ndim < 2:
            return weight + 0.2 * noise
        return noise * (0.5 if "embed" in name or "wte" in name else weight.shape[-1] ** -0.5)

    module.update(tree_map_with_path(draw, module.parameters()))
    module.eval()
    return module


def rounded(module: nn.Module, kind: Kind, part: str) -> None:
    """Give the matrices whose name has `part` in it the values that blocks of `kind` can hold."""

    def nearest(name: str, weight: mx.array) -> mx.array:
        if weight.ndim < 2 or not re.search(part, name):
            return weight
        return mx.array(dequantize(quantize(np.array(weight), kind), kind))

    module.update(tree_map_with_path(nearest, module.parameters()))


def logits(module: nn.Module, tokens: list[int]) -> np.ndarray:
    """(L, V), with caches, without which mlx-lm computes something else of a few models."""
    out = module(mx.array([tokens]), cache=make_prompt_cache(module))
    return np.array(out[0].astype(mx.float32))


def write_model(
    path: Path,
    case: Case,
    module: nn.Module,
    *,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    kind_of: Callable[[str], Kind] = lambda name: Kind.F32,
) -> Path:
    """Write `module`; `metadata` and `tensors` are added, or (None) left out."""
    writer = GGUFWriter(path, case.arch)
    for key, value in (_keys(case, module) | tokenizer_keys() | (metadata or {})).items():
        if value is not None:
            add_key(writer, key, value)
    stored_as: dict[str, np.ndarray | None] = {**stored_tensors(case, module), **(tensors or {})}
    for name, tensor in stored_as.items():
        if tensor is None:
            continue
        kind = kind_of(name) if tensor.ndim > 1 else Kind.F32
        stored = np.ascontiguousarray(tensor) if kind == Kind.F32 else quantize(np.ascontiguousarray(tensor), kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _keys(case: Case, module: nn.Module) -> dict[str, Any]:
    config = case.settings
    usual = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    keys = {f"{case.arch}.{key}": value for key, value in (usual | case.keys).items()}
    if case.arch == "apertus":  # XIELU's numbers are no tensors
        numbers = [layer.mlp.act_fn for layer in module.model.layers]
        for name in ("alpha_p", "alpha_n", "beta", "eps"):
            keys[f"xielu.{name}"] = [float(number[name].item()) for number in numbers]
    return keys


def stored_tensors(case: Case, module: nn.Module) -> dict[str, np.ndarray]:
    """llama.cpp's tensors of the model, by name."""
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == case.arch)
    known = get_tensor_name_map(arch, case.settings["num_hidden_layers"])
    tensors: dict[str, np.ndarray] = {}
    halves: dict[str, np.ndarray] = {}
    for name, weight in tree_flatten(module.parameters()):
        if ".act_fn." in name or (case.settings["tie_word_embeddings"] and "lm_head" in name):
            continue
        for original, stored in _as_stored(_published(name), np.array(weight), case):
            tensor = known.get_name(original, try_suffixes=(".weight", ".bias")) or original
            tensors[tensor] = stored
    if "gate_up_in_one" in case.traits:
        for tensor in [tensor for tensor in tensors if "ffn_gate_exps" in tensor]:
            halves = {part: tensors.pop(tensor.replace("gate", part)) for part in ("gate", "up")}
            tensors[tensor.replace("gate", "gate_up")] = np.concatenate([halves["gate"], halves["up"]], axis=1)
    for kind in ("altup_proj", "altup_unembd_proj"):
        if f"{kind}.0" in tensors:
            tensors[f"{kind}.weight"] = np.stack([tensors.pop(f"{kind}.{index}") for index in range(3)])
    if "llama3" in case.traits:  # Step35Model.generate_extra_tensors, of half a head
        inverse = 5e4 ** (-np.arange(0, 8, 2) / 8) / (2 * np.pi)
        smooth = np.clip((8192 * inverse - 1) / 3, 0, 1)
        tensors["rope_freqs.weight"] = np.array([*(1 / ((1 - smooth) / 8 + smooth)), *[1.0] * 4], np.float32)
    if "proportional" in case.traits:  # a quarter of the 16 frequencies of a global head turns
        tensors["rope_freqs.weight"] = np.array([1.0] * 4 + [1e30] * 12, np.float32)
    return tensors


def _published(name: str) -> str:
    """The name in the checkpoint, with experts stacked as the converter stacks them."""
    name = name.replace("model.language_model.", "model.").removeprefix("language_model.")
    name = re.sub(r"backbone(.*)\.mixer\.switch_mlp\.fc1", r"model\1.mlp.experts.up_proj", name)
    name = re.sub(r"backbone(.*)\.mixer\.switch_mlp\.fc2", r"model\1.mlp.experts.down_proj", name)
    name = re.sub(r"\.(mlp|block_sparse_moe|feed_forward)\.switch_mlp\.", ".mlp.experts.", name)
    name = re.sub(r"\.gate\.gate_proj\.", ".gate.", name)
    name = re.sub(r"\.([qkv])_conv\.conv\.", r".\1_conv1d.", name)
    name = name.replace(".mlp.share_expert.", ".share_expert.")
    return name


def _block(name: str) -> str:
    number = re.search(r"\.(\d+)\.", name)
    assert number is not None, name
    return f"blk.{number[1]}."


def _permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute"""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def _tile(values: np.ndarray, case: Case, width: int, axis: int = 0) -> np.ndarray:
    """_LinearAttentionVReorderBase._reorder_v_heads: grouped by key head -> one of each group in turn."""
    config = case.settings
    groups, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    order = np.arange(heads * width).reshape(groups, heads // groups, width).swapaxes(0, 1).ravel()
    return np.take(values, order, axis)


def _delta(name: str, weight: np.ndarray, case: Case) -> np.ndarray:
    """_LinearAttentionVReorderBase.modify_tensors"""
    config = case.settings
    width, keys = config["linear_value_head_dim"], 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    if ".in_proj_qkv." in name or ".conv1d." in name:
        return np.concatenate([weight[:keys], _tile(weight[keys:], case, width)])
    if ".in_proj_z." in name:
        return _tile(weight, case, width)
    if ".out_proj." in name:
        return _tile(weight, case, width, axis=1)
    if re.search(r"\.in_proj_[ab]\.|A_log|dt_bias", name):
        return _tile(weight, case, 1)
    return weight


def _qkvz(name: str, weight: np.ndarray, case: Case) -> Iterable[Weight]:
    """Qwen3NextModel.modify_tensors"""
    config = case.settings
    groups, key = config["linear_num_key_heads"], config["linear_key_head_dim"]
    value = config["linear_num_value_heads"] // groups * config["linear_value_head_dim"]
    grouped = weight.reshape(groups, 2 * key + 2 * value, -1)
    kinds = np.split(grouped, [key, 2 * key, 2 * key + value], axis=1)
    q, k, v, z = (kind.reshape(-1, weight.shape[1]) for kind in kinds)
    yield _block(name) + "attn_qkv.weight", np.concatenate([q, k, v])
    yield _block(name) + "attn_gate.weight", z


def _kv_b(name: str, weight: np.ndarray, case: Case) -> Iterable[Weight]:
    """DeepseekV2Model.modify_tensors"""
    config = case.settings
    by_head = weight.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
    keys, values = np.split(by_head, [config["qk_nope_head_dim"]], axis=1)
    yield _block(name) + "attn_k_b.weight", keys.transpose(0, 2, 1)
    yield _block(name) + "attn_v_b.weight", values


def _three(name: str, parts: Iterable[np.ndarray], case: Case) -> Iterable[Weight]:
    for kind, rows in zip("qkv", parts, strict=True):
        heads = case.settings["num_attention_heads" if kind == "q" else "num_key_value_heads"]
        turned = rows if kind == "v" else _permute(rows, heads)
        yield f"{_block(name)}attn_{kind}.{name.rpartition('.')[2]}", turned


def _wqkv(name: str, weight: np.ndarray, case: Case) -> Iterable[Weight]:
    """InternLM2Model.modify_tensors"""
    config = case.settings
    groups, heads = config["num_key_value_heads"], config["num_attention_heads"]
    grouped = weight.reshape(groups, heads // groups + 2, config["head_dim"], -1)
    parts = (grouped[:, :-2], grouped[:, -2], grouped[:, -1])
    yield from _three(name, (part.reshape(-1, weight.shape[1]) for part in parts), case)


def _qkv_apart(name: str, weight: np.ndarray, case: Case) -> Iterable[Weight]:
    """BailingMoeModel.modify_tensors"""
    yield from _three(name, np.split(weight, [64, 96]), case)


def _qkv_by_kind(name: str, weight: np.ndarray, case: Case) -> Iterable[Weight]:
    """GPTNeoXModel.modify_tensors"""
    by_head = weight.reshape(case.settings["num_attention_heads"], 3, -1, *weight.shape[1:])
    yield f"{_block(name)}attn_qkv.{name.rpartition('.')[2]}", by_head.swapaxes(0, 1).reshape(weight.shape)


def _shared(name: str, weight: np.ndarray, case: Case) -> Iterable[Weight]:
    """GraniteMoeModel.modify_tensors"""
    gate, up = np.split(weight, 2)
    yield _block(name) + "ffn_gate_shexp.weight", gate
    yield _block(name) + "ffn_up_shexp.weight", up


def _renamed(tensor: str) -> Store:
    def store(name: str, weight: np.ndarray, case: Case) -> Iterable[Weight]:
        yield _block(name) + tensor, weight

    return store


def _altup(name: str, weight: np.ndarray, case: Case) -> Iterable[Weight]:
    """Gemma3NModel.modify_tensors stacks them; see stored_tensors"""
    part = re.search(r"altup_(unembed_)?projections\.(\d)", name)
    assert part is not None
    yield f"altup_{'unembd_' if part[1] else ''}proj.{part[2]}", weight


STORES: tuple[tuple[str, Store], ...] = (
    (r"\.in_proj_qkvz\.", _qkvz),
    (r"\.kv_b_proj\.", _kv_b),
    (r"\.embed_q\.", _renamed("attn_k_b.weight")),
    (r"\.unembed_out\.", _renamed("attn_v_b.weight")),
    (r"\.wqkv\.", _wqkv),
    (r"^model\.h\.\d+\.attention\.query_key_value\.", _qkv_by_kind),
    (r"\.shared_mlp\.input_linear\.", _shared),
    (r"altup_(unembed_)?projections\.", _altup),
    (r"\.correct_output_scale$", _renamed("altup_correct_scale.weight")),
    (r"\.dt_bias$", _renamed("ssm_dt.bias")),
    (r"\.(e_score_correction_bias|expert_bias)$", _renamed("exp_probs_b.bias")),
    (r"\.(sinks|attention_sink_bias)$", _renamed("attn_sinks.weight")),
    (r"\.gate\.gate\.weight$", _renamed("ffn_gate_inp.weight")),
    (r"\.router_bias$", _renamed("exp_probs_b.bias")),
    (r"\.g_proj\.weight$", _renamed("attn_gate.weight")),
    (r"\.layer_scalar$", _renamed("layer_output_scale.weight")),
    (r"\.router\.scale$", _renamed("ffn_gate_inp.scale")),
    (r"\.per_expert_scale$", _renamed("ffn_down_exps.scale")),
    (r"\.switch_glu\.gate_proj\.", _renamed("ffn_gate_exps.weight")),
    (r"\.switch_glu\.up_proj\.", _renamed("ffn_up_exps.weight")),
    (r"\.switch_glu\.down_proj\.", _renamed("ffn_down_exps.weight")),
)


def _as_stored(name: str, weight: np.ndarray, case: Case) -> Iterable[Weight]:
    if "tiled" in case.traits and ".linear_attn." in name:
        weight = _delta(name, weight, case)
    if name.endswith("A_log"):
        weight = -np.exp(weight)
    if "columns" in case.traits and name.endswith(("A_log", ".D")):  # Mamba2Model.modify_tensors
        weight = weight.reshape(-1, 1)
    if "columns" in case.traits and re.search(r"\.(mixer|mamba)\.norm\.weight", name):
        weight = weight.reshape(case.keys["ssm.group_count"], -1)
    if weight.ndim == 3 and re.search(r"conv(1d)?\.weight", name):
        weight = weight[..., 0]
    if re.search(r"\.[qkv]_conv1d\.", name):  # KimiLinearModel.modify_tensors
        weight = weight[None, :, None]
    if "one_plus" in case.traits and name.endswith("norm.weight"):  # NemotronModel.modify_tensors
        weight = weight + 1
    if "neighbours" in case.traits and ".q_proj." in name:
        weight = _permute(weight, case.settings["num_attention_heads"])
    if "neighbours" in case.traits and ".k_proj." in name:
        weight = _permute(weight, case.settings["num_key_value_heads"])
    if "qkv_apart" in case.traits and ".query_key_value." in name:
        return _qkv_apart(name, weight, case)
    for pattern, store in STORES:
        if re.search(pattern, name):
            return store(name, weight, case)
    if case.arch == "gptneox":
        name = name.replace("model.embed_out", "embed_out").replace("model.h.", "gpt_neox.layers.")
        return [(name.replace("model.", "gpt_neox."), weight)]
    return [(name.replace("model.", "transformer.") if case.arch == "gpt2" else name, weight)]
