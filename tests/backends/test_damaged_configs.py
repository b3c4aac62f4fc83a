"""Settings of a folder that are of the wrong type or size: one line, on every backend, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.backends import BACKENDS, tiny_folder
from safetensors.numpy import load_file, save_file

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.checkpoint.config import ENDLESS, context_of

CONFIG: list[tuple[str, Any]] = [
    ("num_hidden_layers", 2**31),
    ("num_hidden_layers", 0),
    ("hidden_size", 2**32),
    ("hidden_size", 0),
    ("head_dim", 2**31 - 1),
    ("vocab_size", 2**31),
    ("vocab_size", 0),
    ("num_attention_heads", 0),
    ("intermediate_size", 1e300),
    ("rope_theta", ""),
    ("rope_scaling", 0),
    ("max_position_embeddings", [0]),
    ("eos_token_id", {}),
    ("eos_token_id", 0.5),
    ("eos_token_id", [[1]]),
    ("model_type", 3),
    ("model_type", None),
]
OTHERS: list[tuple[str, str, Any]] = [
    ("tokenizer_config.json", "extra_special_tokens", 3),
    ("tokenizer_config.json", "additional_special_tokens", True),
    ("tokenizer_config.json", "extra_special_tokens", [3]),
    ("tokenizer_config.json", "bos_token", {"a": 1}),
    ("tokenizer_config.json", "added_tokens_decoder", {"x": {"content": "a"}}),
    ("tokenizer_config.json", "chat_template", 0.5),
    ("generation_config.json", "eos_token_id", {}),
    ("generation_config.json", "eos_token_id", "3"),
]
RAW = [
    '{"a": 1e400}',
    '{"a": NaN}',
    '{"a": "\\ud800"}',
    '{"model_type": "llama", "a": ' + "9" * 99 + "}",
    "[" * 9999,
    "[1]",
    "{",
]


@pytest.fixture
def folder() -> Path:
    place = tiny_folder("llama")
    for name in ("tokenizer_config.json", "generation_config.json"):
        (place / name).write_text("{}")
    return place


def load(folder: Path, backend: str) -> None:
    model = mlx_lqr.load(folder, backend=backend)  # type: ignore[arg-type]
    assert model.tokenizer.has_chat_template is not None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("file", "name", "value"), [*(("config.json", *one) for one in CONFIG), *OTHERS])
def test_a_setting_that_cannot_be_is_one_line(backend: str, file: str, name: str, value: Any, folder: Path) -> None:
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**settings, name: value}))
    with pytest.raises(InputError) as refusal:
        load(folder, backend)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", RAW)
def test_a_file_that_is_no_sound_json_is_one_line(file: str, text: str, folder: Path) -> None:
    (folder / file).write_text(text)
    with pytest.raises(InputError, match="JSON") as refusal:
        load(folder, "mlx")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_is_only_measured_has_sizes_too(backend: str, tmp_path: Path) -> None:
    """Or its library would build it before anybody looks at a weight."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2**31}))
    with pytest.raises(InputError, match="n_layer 2147483648, which no model has"):
        load(tmp_path, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "named",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "paged|evil/kernel@main:attend"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"experts_implementation": {"": "eager", "text_config": "evil/kernel"}},
        {"text_config": {"attn_implementation": "evil/kernel"}},
        {"model_file": "evil.py"},
    ],
)
def test_code_that_a_config_names_is_refused(backend: str, named: dict[str, Any], folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | named))
    with pytest.raises(InputError, match=r"evil.*(: refused|, which is never run)"):
        load(folder, backend)


ROPE = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": {"a": 1}}},
        {"rope_theta": 1.0, "rope_scaling": ROPE},
        {"rope_scaling": {**ROPE, "factor": 1e-320}},
    ],
)
def test_angles_that_cannot_be_computed(changes: dict[str, Any], folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(InputError, match=r"config\.json's rope_"):
        load(folder, "mlx")


@pytest.mark.parametrize(
    "config",
    [
        {"max_position_embeddings": "x"},
        {"max_position_embeddings": [0]},
        {"max_position_embeddings": -5},
        {"max_position_embeddings": 1e300},
        {"rope_parameters": "x"},
        {"rope_scaling": [1]},
        {"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": "x"}},
    ],
)
def test_a_context_that_cannot_be(config: dict[str, Any]) -> None:
    """Of models that are measured, whose settings nobody else looks at."""
    with pytest.raises(InputError, match=r"config\.json says"):
        context_of(config)
    assert context_of({"max_position_embeddings": 0}) == context_of({}) == (ENDLESS, True)


def test_weights_of_a_dtype_that_mlx_has_not(folder: Path) -> None:
    """Also where they are looked at to see whether the head is the embeddings."""
    weights = load_file(folder / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    save_file({**weights, "lm_head.weight": embeddings.astype(np.float64)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="unsupported dtype"):
        load(folder, "mlx")


@pytest.mark.parametrize("entry", [0, {"name": {"a": 1}, "template": "x"}, {"template": "x"}])
def test_chat_templates_without_names(entry: Any, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": [entry]}))
    with pytest.raises(InputError, match="no names"):
        load(folder, "mlx")
