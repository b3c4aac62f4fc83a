"""What config.json says is computed as transformers computes it, on every backend, or refused with the key's name."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.backends import BACKENDS
from helpers.real_configs import REAL
from helpers.tiny_configs import (
    ALTERNATING,
    BASE,
    FAMILIES,
    LINEAR,
    LLAMA3,
    LONG,
    YARN,
    our_logits,
    plain_logits,
    relative,
    weights_folder,
    with_config,
)
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mlx_lqr import InputError
from mlx_lqr.backends.checkpoint.config import model_config
from mlx_lqr.backends.checkpoint.families import OTHERS_COMPUTE, ROPE_THETA, SETTINGS
from mlx_lqr.backends.mlx.family import arguments
from mlx_lqr.backends.torch.load import transformers_config
from mlx_lqr.convert import convert

CHANGES: dict[str, list[Any]] = {
    "attention_bias": [True],
    "attn_logit_softcapping": [2.0, None],
    "decoder_sparse_step": [2],
    "final_logit_softcapping": [2.0, None],
    "head_dim": [8],
    "hidden_act": ["gelu", "relu", "mish"],
    "hidden_activation": ["silu", "gelu", "mish", "no_such"],
    "hidden_size": [32],
    "intermediate_size": [16],
    "layer_types": [ALTERNATING, ["full_attention"] * 3, ["sliding_attention"] * 3, ["full_attention"] * 2],
    "max_position_embeddings": [40],
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
    "rope_scaling": [
        LLAMA3,
        YARN | {"attention_factor": 1.7},
        LONG,
        {"type": "linear", "factor": 2.0},
        {"rope_type": "mrope"},
        {"factor": 2.0},
    ],
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
                logits = our_logits(folder, backend)
            except InputError as error:
                message = str(error)
                allowed = key in REFUSED | MAY_BE_REFUSED[backend] or "do not fit its config.json" in message
                assert allowed or not can_compute(folder), (config.get(key), message)
                assert key in message, (config.get(key), message)
                continue
            if expected is None:
                expected = plain_logits(folder)
            assert relative(logits, expected) < 1e-3, (backend, config.get(key))


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_folder_says_the_same(family: str, tmp_path: Path) -> None:
    config = {key: value for key, value in BASE[family].items() if key not in ("rope_theta", "rms_norm_eps")}
    if family == "phi3":
        config["rope_scaling"] = LONG
    source = with_config(weights_folder(family), config, tmp_path / "source")
    folder = convert(source, tmp_path / "out")
    expected = plain_logits(source)
    for backend in BACKENDS:
        assert relative(our_logits(folder, backend), expected) < 1e-3


def test_irregular_orders_of_gemma3s_layers_are_computed(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    folder = with_config(weights_folder("gemma3_text"), BASE["gemma3_text"] | {"layer_types": kinds}, tmp_path)
    for backend in BACKENDS:
        assert relative(our_logits(folder, backend), plain_logits(folder)) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_of_its_own_is_used_whatever_the_config_says_of_ties(backend: str, tmp_path: Path) -> None:
    folder = with_config(weights_folder("llama"), BASE["llama"] | {"tie_word_embeddings": True}, tmp_path)
    assert relative(our_logits(folder, backend), plain_logits(folder)) < 1e-3


def test_unknown_keys_are_named_and_ignored() -> None:
    with pytest.warns(RuntimeWarning, match="has favourite_colour, of which models of the type 'llama' know nothing"):
        model_config(
            BASE["llama"] | {"favourite_colour": "blue", "nothing": None, "_private": 3, "auto_map": {"a": "b"}}
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_logit_softcapping", 30.0),
        ("logits_scaling", 8.0),
        ("no_rope_layers", [1]),
        ("quantize_activations", True),
    ],
)
def test_keys_of_other_architectures_are_refused_where_they_are_switched_on(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{key} .*'llama' do not compute"):
        model_config(BASE["llama"] | {key: value})


@pytest.mark.parametrize("name", [name for name, (config, *_) in REAL.items() if config["model_type"] in FAMILIES])
def test_real_configs_are_understood_without_a_word(name: str, recwarn: pytest.WarningsRecorder) -> None:
    config, context, window = REAL[name]
    meaning = model_config(config)
    assert meaning.context_length == context
    assert meaning.window == window
    assert arguments(meaning)["hidden_size"] == transformers_config(config, meaning).hidden_size
    assert not [warning for warning in recwarn if warning.category is RuntimeWarning]
