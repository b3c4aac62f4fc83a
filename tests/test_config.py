"""What config.json says is computed as transformers computes it, on every backend, or refused with the key's name."""

from __future__ import annotations

import copy
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
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.config import model_config
from mlx_lqr.backends.families import OTHERS_COMPUTE, ROPE_THETA, SETTINGS
from mlx_lqr.backends.mlx_family import arguments
from mlx_lqr.backends.mlx_lm_models import is_supported
from mlx_lqr.backends.torch_load import transformers_config
from mlx_lqr.runtime.decode import decode

CPU = torch.device("cpu")
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


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: "-".join([scaling["rope_type"], *list(scaling)[3:]]))
def test_scaled_rotations_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    for family, context, theta in (("llama", 64, 5e5), ("phi3", 128, 1e4), ("qwen3_moe", 4096, 1e6)):
        if family == "phi3" and scaling["rope_type"] != "longrope":
            continue
        config = BASE[family] | {"max_position_embeddings": context, "rope_theta": theta, "rope_scaling": scaling}
        ours = model_config(config).rotations["full_attention"]
        theirs, scale = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](CONFIG_MAPPING[family](**copy.deepcopy(config)), CPU)
        np.testing.assert_allclose(ours.frequencies, theirs.numpy(), rtol=1e-5)
        assert ours.scale == pytest.approx(scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_refuses_a_scaled_rotation_that_it_can_have(family: str, tmp_path: Path) -> None:
    for scaling in (LINEAR, LLAMA3, YARN, LONG) if family != "phi3" else (LONG,):
        config = BASE[family] | {"rope_scaling": scaling, "original_max_position_embeddings": 32}
        folder = with_config(weights_folder(family), config, tmp_path)
        for backend in BACKENDS:
            assert load(folder, backend).context_length == (32 if scaling is LONG else 64)


@pytest.mark.parametrize("family", [family for family in FAMILIES if "sliding_window" in SETTINGS[family]])
def test_texts_grow_past_the_window_alike(family: str, tmp_path: Path) -> None:
    """Token by token in every cache: of one sequence, of a batch, frozen for derivatives, and of a compiled step."""
    long = BASE[family] | {"max_position_embeddings": 400, "original_max_position_embeddings": 400}
    folder = with_config(weights_folder(family), long, tmp_path)
    ours, theirs = load(folder, "mlx"), load(folder, "torch")
    count = 40 if family == "qwen2" else 12  # a step is compiled after 32 tokens, which takes seconds
    assert tokens(ours, [PROMPT], count) == tokens(theirs, [PROMPT], count)
    batch = [PROMPT, PROMPT[:3], PROMPT[5:14]]
    assert tokens(ours, batch, 12) == [tokens(ours, [prompt], 12)[0] for prompt in batch] == tokens(theirs, batch, 12)
    traces = ours.trace(PROMPT), theirs.trace(PROMPT)
    for k in range(3):
        assert relative(ours.jacobian(traces[0], k), theirs.jacobian(traces[1], k)) < 1e-3


@pytest.mark.parametrize("family", ["phi3", "gemma2", "qwen2"])
@pytest.mark.parametrize("window", [5, 24, 100])
def test_a_context_rolls_with_windows_shorter_and_longer_than_it(family: str, window: int, tmp_path: Path) -> None:
    short = BASE[family] | {"max_position_embeddings": 24, "original_max_position_embeddings": 24}
    folder = with_config(weights_folder(family), short | {"sliding_window": window}, tmp_path)
    found = [tokens(load(folder, backend), [PROMPT], 30, overflow="roll") for backend in BACKENDS]
    assert found[0] == found[1]


def tokens(model: Any, prompts: list[list[int]], count: int, **options: Any) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for i, token in decode(model, prompts, max_tokens=count, **options):
        found[i].append(token)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("scaling", "context"), [(LONG, 32), (DYNAMIC, 44)])
def test_a_rotation_that_changes_with_the_length_is_used_up_to_there(
    backend: str, scaling: dict[str, Any], context: int, tmp_path: Path
) -> None:
    config = BASE["llama"] | {"rope_scaling": scaling, "max_position_embeddings": 44}
    model = load(with_config(weights_folder("llama"), config, tmp_path), backend)
    assert model.context_length == context
    assert len(tokens(model, [PROMPT], context + 1 - len(PROMPT))[0]) == context + 1 - len(PROMPT)
    with pytest.raises(InputError, match="do not fit the model's context"):
        tokens(model, [PROMPT], context + 2 - len(PROMPT))
    with pytest.raises(InputError, match="cannot roll"):
        tokens(model, [PROMPT], 5, overflow="roll")


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


REAL: dict[str, tuple[dict[str, Any], int, int | None]] = {
    # public config.json files: what is said beside the sizes, the context, and the window
    "Llama-3.2-1B": (
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0",
            "unsloth_fixed": True,
            "use_cache": True,
            "vocab_size": 128256,
        },
        131072,
        None,
    ),
    "SmolLM2-135M": (
        {
            "model_type": "llama",
            "hidden_size": 576,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
            "vocab_size": 49152,
        },
        8192,
        None,
    ),
    "Mistral-7B-v0.1": (
        {
            "model_type": "mistral",
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
        32768,
        4096,
    ),
    "Mistral-Nemo": (
        {
            "model_type": "mistral",
            "head_dim": 128,
            "hidden_size": 5120,
            "max_position_embeddings": 1024000,
            "num_hidden_layers": 40,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "vocab_size": 131072,
        },
        1024000,
        None,
    ),
    "Mixtral-8x7B": (
        {
            "model_type": "mixtral",
            "max_position_embeddings": 32768,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
        },
        32768,
        None,
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_mrope": False,
            "use_sliding_window": False,
        },
        32768,
        None,
    ),
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "num_hidden_layers": 48,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        40960,
        None,
    ),
    "Qwen3-8B with YaRN": (
        {
            "model_type": "qwen3",
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "num_key_value_heads": 8,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            "sliding_window": None,
            "use_sliding_window": False,
        },
        40960,
        None,
    ),
    "Gemma-2B": (
        {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None, "num_key_value_heads": 1},
        8192,
        None,
    ),
    "Gemma-2-2B": (
        {
            "model_type": "gemma2",
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
        8192,
        4096,
    ),
    "Gemma-3-270M": (
        {
            "model_type": "gemma3_text",
            "_sliding_window_pattern": 6,
            "attn_logit_softcapping": None,
            "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
            "max_position_embeddings": 32768,
            "num_hidden_layers": 18,
            "num_key_value_heads": 1,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": 512,
            "use_bidirectional_attention": False,
        },
        32768,
        512,
    ),
    "Phi-3-mini-128k": (
        {
            "model_type": "phi3",
            "attention_bias": False,
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
            "embd_pdrop": 0.0,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", "short_factor": [1.1] * 48, "long_factor": [2.0] * 48},
            "sliding_window": 262144,
        },
        4096,
        262144,
    ),
    "Phi-4-mini": (
        {
            "model_type": "phi3",
            "attention_bias": False,
            "full_attn_mod": 1,
            "hidden_size": 3072,
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
            "sliding_window": 262144,
            "tie_word_embeddings": True,
        },
        4096,
        262144,
    ),
    "OLMo-2-1B": (
        {"model_type": "olmo2", "attention_bias": False, "max_position_embeddings": 4096, "rope_theta": 500000},
        4096,
        None,
    ),
    "SmolLM3-3B": (
        {
            "model_type": "smollm3",
            "layer_types": ["full_attention"] * 36,
            "max_position_embeddings": 65536,
            "max_window_layers": 28,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "pretraining_tp": 2,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        65536,
        None,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_configs_are_understood_without_a_word(name: str, recwarn: pytest.WarningsRecorder) -> None:
    config, context, window = REAL[name]
    meaning = model_config(config)
    assert meaning.context_length == context
    assert meaning.window == window
    assert arguments(meaning)["hidden_size"] == transformers_config(config, meaning).hidden_size
    assert not [warning for warning in recwarn if warning.category is RuntimeWarning]
