"""What config.json says is computed as transformers computes it, on every backend, or refused with the key's name."""

from __future__ import annotations

import functools
import json
import tempfile
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backends import BACKENDS
from tokenizers import Tokenizer, models
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.families import SETTINGS
from mlx_lqr.backends.mlx_lm_models import is_supported

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
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5], "long_factor": [9.0] * 8}
SCALINGS = [
    None,
    LINEAR,
    {"rope_type": "dynamic", "factor": 2.0},
    LLAMA3,
    YARN,
    YARN | {"beta_fast": 4, "beta_slow": 0.5, "truncate": False},
    YARN | {"attention_factor": 1.7},
    YARN | {"mscale": 2.0, "mscale_all_dim": 0.7},
    YARN | {"mscale": 0.7},
    {"type": "longrope", **LONG, "original_max_position_embeddings": 32},
    {"type": "su", **LONG},
    {"rope_type": "longrope", **LONG, "factor": 4.0, "attention_factor": 1.2},
    {"rope_type": "mrope", "mrope_section": [2, 3, 3]},
    {"rope_type": "linear"},
    {"factor": 2.0},
]
ALTERNATING = ["full_attention", "sliding_attention", "full_attention"]
CHANGES: dict[str, list[Any]] = {
    "architectures": [["Other"]],
    "attention_bias": [True],
    "attention_dropout": [0.5],
    "attn_logit_softcapping": [2.0, None],
    "bos_token_id": [5],
    "chunk_size_feed_forward": [2],
    "decoder_sparse_step": [2],
    "dtype": ["float32"],
    "embd_pdrop": [0.5],
    "eos_token_id": [5, [5, 6]],
    "final_logit_softcapping": [2.0, None],
    "head_dim": [8, 32],
    "hidden_act": ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python", "quick_gelu", "relu", "mish"],
    "hidden_activation": ["silu", "gelu", "relu", "mish", "no_such"],
    "hidden_size": [32],
    "id2label": [{"0": "yes"}],
    "initializer_range": [0.5],
    "intermediate_size": [16],
    "is_encoder_decoder": [True],
    "label2id": [{"yes": 0}],
    "layer_types": [ALTERNATING, ["full_attention"] * 3, ["sliding_attention"] * 3, ["full_attention"] * 2],
    "max_position_embeddings": [WINDOW, 40, 4096],
    "max_window_layers": [0, 2, 5],
    "mlp_bias": [True],
    "mlp_only_layers": [[], [0, 1], None],
    "moe_intermediate_size": [32],
    "no_rope_layer_interval": [1, 3],
    "no_rope_layers": [[1, 0, 0], [1, 1], None],
    "norm_topk_prob": [False],
    "num_attention_heads": [2, 8],
    "num_experts": [2, 8],
    "num_experts_per_tok": [1, 3],
    "num_hidden_layers": [2, 4],
    "num_key_value_heads": [1, 4, None],
    "num_local_experts": [2, 8],
    "original_max_position_embeddings": [32],
    "output_hidden_states": [True],
    "output_router_logits": [True],
    "pad_token_id": [None, 4],
    "partial_rotary_factor": [0.5],
    "pretraining_tp": [2],
    "problem_type": ["regression"],
    "query_pre_attn_scalar": [16],
    "resid_pdrop": [0.5],
    "return_dict": [False],
    "rms_norm_eps": [0.1],
    "rope_local_base_freq": [500.0],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 1000.0},
        {"rope_theta": 1000.0, **LINEAR},
        {"rope_theta": 1000.0, **LLAMA3},
        {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        },
        {},
        None,
    ],
    "rope_scaling": SCALINGS,
    "rope_theta": [5000.0],
    "router_aux_loss_coef": [0.5],
    "router_jitter_noise": [0.5],
    "sliding_window": [3, 64, None],
    "sliding_window_pattern": [1, 3, 6],
    "tie_word_embeddings": [True, False],
    "transformers_version": ["4.0.0"],
    "use_bidirectional_attention": [True, None],
    "use_cache": [False],
    "use_sliding_window": [False, True],
    "vocab_size": [40, 64],
}
"""Other values than the base's for every key that transformers' config classes know, and for those that they take."""
TAKEN = {"rope_scaling", "rope_theta", "partial_rotary_factor"}
"""Read by all of transformers' config classes without being fields of theirs."""
TAKEN_BY = {
    "gemma3_text": {"rope_local_base_freq", "sliding_window_pattern"},
    "mistral": {"layer_types"},
    "olmo2": {"head_dim"},
    "phi3": {"head_dim"},
    "qwen2": {"head_dim"},
    "qwen3_moe": {"head_dim"},
    "smollm3": {"head_dim"},
}


def known_keys(family: str) -> set[str]:
    return {field.name for field in fields(CONFIG_MAPPING[family])} | TAKEN | TAKEN_BY.get(family, set())


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
    model = mlx_lqr.load(folder, backend=backend, dtype="float32")  # type: ignore[arg-type]
    (along,) = model.logits_along([(PROMPT[:1], PROMPT[1:])])
    assert relative(model.logits(PROMPT), along[-1]) < 1e-4
    return along


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def verdict(folder: Path, expected: np.ndarray | None, backend: str) -> str:
    """ "equal", how far off, or the line of the refusal."""
    try:
        found = our_logits(folder, backend)
    except InputError as error:
        assert "\n" not in str(error)
        return str(error)
    if expected is None:
        return "computed what transformers does not"
    return "equal" if found.shape == expected.shape and (off := relative(found, expected)) < 1e-3 else f"off by {off}"


if __name__ == "__main__":
    import sys
    import time

    for family in FAMILIES:
        if len(sys.argv) > 1 and family not in sys.argv[1:]:
            continue
        start = time.time()
        n = 0
        place = Path(tempfile.mkdtemp())
        for key in sorted(known_keys(family) | set(BASE[family])):
            if key == "model_type":
                continue
            for value in [*CHANGES[key], "LEFT OUT"]:
                config = dict(BASE[family])
                if value == "LEFT OUT":
                    if key not in config:
                        continue
                    del config[key]
                else:
                    config[key] = value
                folder = with_config(weights_folder(family), config, place)
                warnings.simplefilter("ignore")
                try:
                    expected = plain_logits(folder)
                    ref = ""
                except Exception as e:
                    expected = None
                    ref = f"   REF {type(e).__name__} {str(e).splitlines()[0][:80]}"
                for backend in BACKENDS:
                    n += 1
                    try:
                        v = verdict(folder, expected, backend)
                    except Exception as e:
                        v = f"!!!!!! {type(e).__name__}: {str(e)[:150]}"
                    if v != "equal" or ref:
                        print(
                            family,
                            key,
                            str(value)[:60],
                            backend,
                            "->",
                            v.replace(str(folder), "F")[:170],
                            ref if backend == "torch" else "",
                        )
        print("=====", family, n, time.time() - start, flush=True)
