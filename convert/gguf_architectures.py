"""The architectures of GGUF files that can be converted: one row each, and the settings that a family has of its own.

A row says what MLX has for an architecture of llama.cpp, and in which of llama.cpp's own ways its weights are stored.
Names of tensors come from the maps of the `gguf` package and shapes from mlx-lm's model class, so a further
architecture is a row and, where it has settings of its own, a function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES

from mlx_lqr.errors import InputError

from .gguf_file import GGUFFile

Settings = Callable[[GGUFFile, dict[str, Any]], dict[str, Any]]

_NO_WINDOW = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 0, "layer_types": None}
_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62
_SMOLLM3_PERIOD = 4  # llama.cpp's own constant; the metadata does not have it


@dataclass(frozen=True)
class Architecture:
    """What an architecture of llama.cpp is in MLX.

    `tensors` is the gguf package's name of it, and `settings` completes the config of a file. `neighbours_turn`: RoPE
    turns neighbouring rows of a head together, so the rows of queries and keys are stored in another order.
    `whole_norms`: norms are stored as what is multiplied by, and MLX adds 1 to its own.
    `partial_rope`: RoPE may turn a part of each head alone.
    """

    tensors: MODEL_ARCH
    model_type: str
    transformers_class: str
    settings: Settings
    mixture: bool = False
    neighbours_turn: bool = False
    whole_norms: bool = False
    partial_rope: bool = False

    @property
    def name(self) -> str:
        """As `general.architecture` states it."""
        return MODEL_ARCH_NAMES[self.tensors]


def architecture(file: GGUFFile) -> Architecture:
    """The row for `file`.

    Raises:
        InputError: there is none.
    """
    name = file.value("general.architecture", str)
    rows = [row for row in ARCHITECTURES if row.name == name]
    if not rows:
        supported = ", ".join(dict.fromkeys(row.name for row in ARCHITECTURES))
        raise InputError(
            f"{file.path} has the architecture {name!r}, which cannot be converted: supported are {supported}"
        )
    mixture = file.value(f"{name}.expert_count", int, 0) > 0
    for row in rows:
        if row.mixture == mixture:
            return row
    if mixture:
        raise InputError(f"{file.path} is a mixture of experts of the architecture {name!r}: use another model")
    raise InputError(f"{file.path} does not state {name}.expert_count: convert the original model to GGUF again")


def _llama(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "attention_bias": any(".attn_" in name and name.endswith(".bias") for name in file.tensors),
        "mlp_bias": any(".ffn_" in name and name.endswith(".bias") for name in file.tensors),
    }


def _mixtral(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    count, used = _experts(file, "llama")
    return {"hidden_act": "silu", "sliding_window": None, "num_local_experts": count, "num_experts_per_tok": used}


def _smollm3(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    return _llama(file, config) | {
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
        "no_rope_layers": [int((index + 1) % _SMOLLM3_PERIOD != 0) for index in range(layers)],
        "no_rope_layer_interval": _SMOLLM3_PERIOD,
    }


def _qwen2(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise InputError(
            f"{file.path} has heads of {config['head_dim']}: mlx-lm's qwen2 cannot do that, use another model"
        )
    return {"hidden_act": "silu"} | _NO_WINDOW


def _qwen3(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "silu", "attention_bias": False} | _NO_WINDOW


def _qwen3_moe(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    count, used = _experts(file, "qwen3moe")
    return _qwen3(file, config) | {
        "num_experts": count,
        "num_experts_per_tok": used,
        "moe_intermediate_size": file.value("qwen3moe.expert_feed_forward_length", int),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    _only_tied(file, config, "Gemma")
    return {"hidden_act": "gelu_pytorch_tanh", "attention_bias": False}


def _gemma2(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    _only_tied(file, config, "Gemma 2")
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


def _phi3(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    head_dim, context = config["head_dim"], config["max_position_embeddings"]
    return {
        "hidden_act": "silu",
        "original_max_position_embeddings": file.value("phi3.rope.scaling.original_context_length", int, context),
        "partial_rotary_factor": file.value("phi3.rope.dimension_count", int, head_dim) / head_dim,
        "sliding_window": file.value("phi3.attention.sliding_window", int, 0) or None,
    }


def _olmo2(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    if file.value("olmo2.attention.sliding_window", int, 0):
        raise InputError(f"{file.path} is an OLMo 3, whose layers slide: only OLMo 2 can be converted, use that")
    return {"hidden_act": "silu", "attention_bias": False}


ARCHITECTURES = (
    Architecture(MODEL_ARCH.LLAMA, "llama", "LlamaForCausalLM", _llama, neighbours_turn=True),
    Architecture(MODEL_ARCH.LLAMA, "mixtral", "MixtralForCausalLM", _mixtral, mixture=True, neighbours_turn=True),
    Architecture(MODEL_ARCH.QWEN2, "qwen2", "Qwen2ForCausalLM", _qwen2),
    Architecture(MODEL_ARCH.QWEN3, "qwen3", "Qwen3ForCausalLM", _qwen3),
    Architecture(MODEL_ARCH.GEMMA2, "gemma2", "Gemma2ForCausalLM", _gemma2, whole_norms=True),
    Architecture(MODEL_ARCH.GEMMA3, "gemma3_text", "Gemma3ForCausalLM", _gemma3, whole_norms=True),
    Architecture(MODEL_ARCH.GEMMA, "gemma", "GemmaForCausalLM", _gemma, whole_norms=True),
    Architecture(MODEL_ARCH.QWEN3MOE, "qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe, mixture=True),
    Architecture(MODEL_ARCH.PHI3, "phi3", "Phi3ForCausalLM", _phi3, partial_rope=True),
    Architecture(MODEL_ARCH.OLMO2, "olmo2", "Olmo2ForCausalLM", _olmo2),
    Architecture(MODEL_ARCH.SMOLLM3, "smollm3", "SmolLM3ForCausalLM", _smollm3, neighbours_turn=True),
)


def _experts(file: GGUFFile, arch: str) -> tuple[int, int]:
    """How many experts there are, and how many a token uses."""
    count, used = file.value(f"{arch}.expert_count", int), file.value(f"{arch}.expert_used_count", int)
    if not 1 <= used <= count:
        raise InputError(f"{file.path} states that a token uses {used} of {count} experts: download it again")
    return count, used


def _only_tied(file: GGUFFile, config: dict[str, Any], family: str) -> None:
    if config["rope_scaling"] is not None or not config["tie_word_embeddings"]:
        raise InputError(
            f"{file.path} is a {family} with scaled RoPE or its own output layer: mlx-lm has neither, use another model"
        )


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
