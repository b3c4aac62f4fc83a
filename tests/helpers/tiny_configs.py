"""Tiny checkpoints of every family as transformers saves them, and the logits of a folder with another config.json."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

import mlx_lqr
from mlx_lqr.backends.checkpoint.families import SETTINGS
from mlx_lqr.backends.mlx.library import is_supported

FAMILIES = [family for family in sorted(SETTINGS) if is_supported(family)]
PROMPT = np.random.default_rng(1).integers(0, 48, 20).tolist()
WINDOW = 6
COMMON: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 64,  # whose root is exact in 16 bits, which mlx-lm rounds Gemma 3's to
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 200.0,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2}
QWEN = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "hidden_act": "silu"}
OWN: dict[str, dict[str, Any]] = {
    "gemma": {"tie_word_embeddings": True, "hidden_act": "gelu"},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": WINDOW, "query_pre_attn_scalar": 9},
    "gemma3_text": {
        "tie_word_embeddings": True,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 9,
        "rope_local_base_freq": 50.0,
    },
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4, **EXPERTS},
    "phi3": {"sliding_window": WINDOW, "original_max_position_embeddings": 64},
    "qwen2": QWEN,
    "qwen3": QWEN,
    "qwen3_moe": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "num_experts": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        **EXPERTS,
    },
    "smollm3": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "no_rope_layer_interval": 2,
        "tie_word_embeddings": True,
    },
}
BASE = {family: {"model_type": family, **COMMON, **OWN.get(family, {})} for family in FAMILIES}

LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5], "long_factor": [9.0] * 8}
LONG = {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 32}
SCALINGS = [
    LINEAR,
    DYNAMIC,
    LLAMA3,
    YARN,
    YARN | {"beta_fast": 4, "beta_slow": 0.5},
    YARN | {"truncate": False},
    YARN | {"attention_factor": 1.7},
    YARN | {"mscale": 2.0, "mscale_all_dim": 0.7},
    YARN | {"mscale": 0.7},
    LONG,
    LONG | {"factor": 4.0},
    LONG | {"attention_factor": 1.2},
]
ALTERNATING = ["full_attention", "sliding_attention", "full_attention"]


@functools.cache
def weights_folder(family: str) -> Path:
    """The family's random weights as transformers saves them, large enough for every part to matter."""
    folder = Path(tempfile.mkdtemp(prefix=f"config-{family}-"))
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**BASE[family]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if name.endswith("norm.weight") and not family.startswith("gemma") else 0.0
            scale = 0.3 if weight.ndim == 1 else 1.5 * weight.shape[-1] ** -0.5
            weight.copy_(centre + scale * torch.randn_like(weight))
    model.save_pretrained(folder)
    words = {f"w{token}": token for token in range(64)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return folder


def with_config(folder: Path, config: dict[str, Any], place: Path) -> Path:
    """A folder with these weights and this config."""
    place.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.name not in ("config.json", "generation_config.json") and not (place / file.name).exists():
            (place / file.name).symlink_to(file)
    (place / "config.json").write_text(json.dumps(config))
    return place


def plain_logits(folder: Path) -> np.ndarray:
    """(L, V), of transformers alone."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([PROMPT]), use_cache=False, return_dict=True).logits[0].numpy()


def our_logits(folder: Path, backend: str) -> np.ndarray:
    """(L, V), all from a whole prompt and the last from a cache too."""
    model = load(folder, backend)
    (along,) = model.logits_along([(PROMPT[:1], PROMPT[1:])])
    assert relative(model.logits(PROMPT), along[-1]) < 1e-4
    return along


def load(folder: Path, backend: str) -> Any:
    return mlx_lqr.load(folder, backend=backend, dtype="float32")  # type: ignore[arg-type]


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
