"""What config.json says is computed as transformers computes it, on every backend, or refused with the key's name."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backends import BACKENDS
from tokenizers import Tokenizer, models
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.families import OTHERS_COMPUTE, ROPE_THETA, SETTINGS
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
CHANGES: dict[str, list[Any]] = {
    "attention_bias": [True],
    "attn_logit_softcapping": [2.0, None],
    "decoder_sparse_step": [2],
    "final_logit_softcapping": [2.0, None],
    "head_dim": [8],
    "hidden_act": ["silu", "gelu", "gelu_pytorch_tanh", "relu", "mish"],
    "hidden_activation": ["silu", "gelu", "mish", "no_such"],
    "hidden_size": [32],
    "intermediate_size": [16],
    "layer_types": [ALTERNATING, ["full_attention"] * 3, ["sliding_attention"] * 3, ["full_attention"] * 2],
    "max_position_embeddings": [40, 4096],
    "max_window_layers": [0, 5],
    "mlp_bias": [True],
    "mlp_only_layers": [[], [0, 1]],
    "moe_intermediate_size": [32],
    "no_rope_layer_interval": [1, 3],
    "no_rope_layers": [[1, 0, 0], [1, 1]],
    "norm_topk_prob": [False],
    "num_attention_heads": [8],
    "num_experts": [2],
    "num_experts_per_tok": [1],
    "num_hidden_layers": [2, 4],
    "num_key_value_heads": [4, None],
    "num_local_experts": [2],
    "original_max_position_embeddings": [32],
    "partial_rotary_factor": [0.5],
    "query_pre_attn_scalar": [16],
    "rms_norm_eps": [0.1],
    "rope_local_base_freq": [500.0],
    "rope_parameters": [
        {"rope_theta": 1000.0, **LINEAR},
        {"full_attention": {"rope_theta": 1000.0, **LINEAR}, "sliding_attention": {"rope_theta": 30.0}},
        {},
    ],
    "rope_scaling": [LLAMA3, YARN | {"attention_factor": 1.7}, LONG, {"rope_type": "mrope"}, {"factor": 2.0}],
    "rope_theta": [5000.0],
    "sliding_window": [3, 64, None],
    "sliding_window_pattern": [1, 6],
    "tie_word_embeddings": [True, False],
    "use_bidirectional_attention": [True],
    "use_sliding_window": [False],
    "vocab_size": [40],
}
"""Other values than the base's for every key of transformers' config classes that can change a number."""
NOTHING: dict[str, Any] = {
    "architectures": ["Other"],
    "attention_dropout": 0.5,
    "bos_token_id": 5,
    "chunk_size_feed_forward": 2,
    "dtype": "float32",
    "embd_pdrop": 0.5,
    "eos_token_id": [5, 6],
    "id2label": {"0": "yes", "1": "no"},
    "initializer_range": 0.5,
    "is_encoder_decoder": True,
    "label2id": {"yes": 0, "no": 1},
    "output_hidden_states": True,
    "output_router_logits": False,
    "pad_token_id": 4,
    "pretraining_tp": 2,
    "problem_type": "regression",
    "resid_pdrop": 0.5,
    "return_dict": True,
    "router_aux_loss_coef": 0.5,
    "router_jitter_noise": 0.5,
    "transformers_version": "4.0.0",
    "use_cache": False,
}
"""Other values for the rest of them."""
MAY_BE_REFUSED = {
    "mlx": {"attn_logit_softcapping", "final_logit_softcapping", "hidden_act", "hidden_activation"},
    "torch": set(),
}
"""Values that transformers computes and a backend does not; besides those that do not fit the weights, and these:"""
REFUSED = {"partial_rotary_factor", "rope_parameters", "rope_scaling", "sliding_window", "use_bidirectional_attention"}
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


def changed(family: str, key: str) -> list[dict[str, Any]]:
    """The base config with other values of this key, and without it."""
    base = BASE[family]
    configs = [base | {key: value} for value in CHANGES[key]]
    if key in base:
        configs.append({name: value for name, value in base.items() if name != key})
    return configs


CASES = [(family, key) for family in FAMILIES for key in sorted(known_keys(family) - NOTHING.keys())]


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


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def refusal(folder: Path, backend: str) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, backend)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_and_default_of_transformers_is_known(family: str) -> None:
    theirs = {field.name: field.default for field in fields(CONFIG_MAPPING[family])}
    assert theirs.keys() - {"rope_parameters"} <= SETTINGS[family].keys() | NOTHING.keys() | OTHERS_COMPUTE.keys()
    assert known_keys(family) <= CHANGES.keys() | NOTHING.keys()
    ours = SETTINGS[family]
    assert {key: value for key, value in ours.items() if key in theirs} == {
        key: value for key, value in theirs.items() if key in ours
    }
    plain = CONFIG_MAPPING[family]().rope_parameters
    theta = plain.get("full_attention", plain)["rope_theta"]
    assert ROPE_THETA.get(family, 1e4) == theta


@pytest.mark.parametrize(("family", "key"), CASES)
def test_a_key_is_computed_as_transformers_does_or_refused_by_name(family: str, key: str, tmp_path: Path) -> None:
    for config in changed(family, key):
        folder = with_config(weights_folder(family), config, tmp_path)
        expected: np.ndarray | None = None
        for backend in BACKENDS:
            try:
                found = our_logits(folder, backend)
            except InputError as error:
                message = str(error)
                allowed = key in REFUSED | MAY_BE_REFUSED[backend] or "do not fit its config.json" in message
                assert allowed or not can_compute(folder), (config.get(key), message)
                assert key in message, (config.get(key), message)
                continue
            if expected is None:
                expected = plain_logits(folder)
            assert relative(found, expected) < 1e-3, (backend, config.get(key))


def can_compute(folder: Path) -> bool:
    """Whether transformers can, with weights for everything."""
    try:
        _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        plain_logits(folder)
    except Exception:
        return False
    return not report["missing_keys"]


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_change_nothing_change_nothing(family: str, tmp_path: Path) -> None:
    config = BASE[family] | {key: value for key, value in NOTHING.items() if key in known_keys(family)}
    folder = with_config(weights_folder(family), config, tmp_path)
    expected = plain_logits(with_config(weights_folder(family), BASE[family], tmp_path / "base"))
    for backend in BACKENDS:
        assert relative(our_logits(folder, backend), expected) < 1e-3
