"""Every architecture that converts from GGUF computes what transformers and mlx-lm compute with the same weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind
from helpers.gguf_cases import CASES
from helpers.tiny_gguf import ARCHITECTURES, FURTHER, VOCABULARY, logits, reference_model, write
from mlx_lm.utils import load_model
from transformers import AutoModelForCausalLM

import mlx_lqr
from mlx_lqr.backends.checkpoint.families import SETTINGS
from mlx_lqr.convert import convert
from mlx_lqr.convert.architectures import ARCHITECTURES as ROWS
from mlx_lqr.errors import InputError

PROMPT = np.random.default_rng(7).integers(0, VOCABULARY, 48).tolist()
MIXTURES = ("mixtral", "qwen3moe")


def sizes_for(arch: str, kind: Kind) -> dict[str, int]:
    """Sizes that the blocks of `kind` divide; those of a K-quant hold 256 values."""
    if "_K" not in kind.name:
        return {}
    experts = {"moe_intermediate_size": 256} if arch == "qwen3moe" else {}
    return {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, **experts}


def their_logits(folder: Path) -> np.ndarray:
    """The logits of mlx-lm's own class."""
    model, _ = load_model(folder)
    return np.array(model(mx.array([PROMPT]))[0].astype(mx.float32))


def our_logits(folder: Path, backend: Any = "mlx") -> np.ndarray:
    model = mlx_lqr.load(folder, backend=backend)
    return np.asarray(model.logits_along([(PROMPT[:1], PROMPT[1:])])[0])


@pytest.mark.parametrize("arch", FURTHER)
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_K])
def test_logits_equal_those_of_the_same_weights(arch: str, kind: Kind, tmp_path: Path) -> None:
    tiny = write(tmp_path / "tiny.gguf", arch, kind, **sizes_for(arch, kind))
    folder = convert(tiny.path, tmp_path / "out", dtype="float32")
    expected = logits(tiny.reference, PROMPT)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(our_logits(folder), expected, atol=1e-3)
    if arch != "gemma":  # where mlx-lm has another approximation of GELU
        np.testing.assert_allclose(their_logits(folder), expected, atol=1e-3)


@pytest.mark.parametrize("arch", FURTHER)
def test_the_torch_backend_computes_the_same(arch: str, tmp_path: Path) -> None:
    tiny = write(tmp_path / "tiny.gguf", arch, Kind.Q8_0)
    folder = convert(tiny.path, tmp_path / "out", dtype="float32")
    np.testing.assert_allclose(our_logits(folder, "torch"), logits(tiny.reference, PROMPT), atol=1e-3)


@pytest.mark.parametrize("arch", sorted(FURTHER.keys() - set(MIXTURES)))
def test_transformers_reads_the_converted_folder(arch: str, tmp_path: Path) -> None:
    tiny = write(tmp_path / "tiny.gguf", arch, Kind.F16)
    model = AutoModelForCausalLM.from_pretrained(convert(tiny.path, tmp_path / "out"), attn_implementation="eager")
    assert model.dtype == torch.float16
    np.testing.assert_allclose(logits(model.float(), PROMPT), logits(tiny.reference, PROMPT), atol=5e-2, rtol=5e-3)


@pytest.mark.parametrize("arch", FURTHER)
def test_a_converted_config_leaves_nothing_to_defaults(arch: str, tmp_path: Path) -> None:
    config = json.loads((convert(write(tmp_path / "t.gguf", arch).path, tmp_path / "out") / "config.json").read_text())
    assert SETTINGS[config["model_type"]].keys() | {"rope_theta", "rope_scaling"} <= config.keys()


def test_every_architecture_is_tested() -> None:
    tested = {(ARCHITECTURES | FURTHER)[arch]["model_type"] for arch in ARCHITECTURES | FURTHER}
    assert tested == SETTINGS.keys() - {"mistral"}  # a Mistral is a Llama in GGUF
    written = {(case.arch, case.model_type) for case in CASES.values()}
    others = {(row.name, row.model_type) for row in ROWS if row.model_type not in tested}
    assert others <= written <= {(row.name, row.model_type) for row in ROWS}


@pytest.mark.parametrize("arch", ["mixtral", "qwen3moe", "phi3"])
def test_quantising_is_that_of_mlx_nn_quantize(arch: str, tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": 64} if arch == "qwen3moe" else {}
    tiny = write(tmp_path / "t.gguf", arch, intermediate_size=128, **sizes)
    plain, _ = load_model(convert(tiny.path, tmp_path / "plain"))
    folder = convert(tiny.path, tmp_path / "quantised", quantize=4)
    wanted = getattr(plain, "quant_predicate", lambda *_: True)  # routers of Qwen3-MoE get 8 bits
    nn.quantize(plain, 64, 4, class_predicate=lambda path, part: hasattr(part, "to_quantized") and wanted(path, part))
    np.testing.assert_array_equal(their_logits(folder), np.array(plain(mx.array([PROMPT]))[0]))
    gate = json.loads((folder / "config.json").read_text())["quantization"].get("model.layers.0.mlp.gate")
    assert gate == ({"group_size": 64, "bits": 8, "mode": "affine"} if arch == "qwen3moe" else None)


def test_phi3_slides_as_its_metadata_says(tmp_path: Path) -> None:
    tiny = write(tmp_path / "t.gguf", "phi3", sliding_window=8)
    folder = convert(tiny.path, tmp_path / "out")
    expected = logits(tiny.reference, PROMPT)
    assert np.abs(expected - logits(reference_model("phi3"), PROMPT)).max() > 0.1
    np.testing.assert_allclose(our_logits(folder), expected, atol=1e-3)


def scaled(kind: str, theta: float, **settings: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings}}


FOURFOLD = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
GEMMA3_4B = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("arch", "metadata", "settings"),
    [
        ("mixtral", FOURFOLD, scaled("linear", 1e6, factor=4.0)),
        ("smollm3", FOURFOLD, scaled("linear", 2e6, factor=4.0)),
        ("gemma3", FOURFOLD, {"rope_parameters": GEMMA3_4B}),  # as Gemma 3 from 4B on: only where it does not slide
        ("qwen3moe", YARN, scaled("yarn", 1e6, factor=4.0, original_max_position_embeddings=16)),
        ("olmo2", YARN, scaled("yarn", 5e5, factor=4.0, original_max_position_embeddings=16)),
    ],
)
def test_rope_is_scaled_as_in_transformers(
    arch: str, metadata: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    name = "llama" if arch == "mixtral" else arch
    keys = {f"{name}.{key}": value for key, value in metadata.items()}
    tiny = write(tmp_path / "t.gguf", arch, metadata=keys, **settings)
    expected = logits(tiny.reference, PROMPT)
    assert np.abs(expected - logits(reference_model(arch), PROMPT)).max() > 0.1
    np.testing.assert_allclose(our_logits(convert(tiny.path, tmp_path / "out")), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("smollm3", {"attention_bias": True, "mlp_bias": True}),
        ("smollm3", {"tie_word_embeddings": False}),
        ("olmo2", {"tie_word_embeddings": True}),
        ("qwen3moe", {"tie_word_embeddings": True}),
    ],
)
def test_biases_and_heads_are_those_of_the_file(arch: str, settings: dict[str, Any], tmp_path: Path) -> None:
    tiny = write(tmp_path / "t.gguf", arch, **settings)
    expected = logits(tiny.reference, PROMPT)
    np.testing.assert_allclose(our_logits(convert(tiny.path, tmp_path / "out")), expected, atol=1e-3)


FACTORS = {"short": [1.0, 1.1, 1.3, 1.5, 1.7, 2.0], "long": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0]}
USUAL = math.sqrt(1 + math.log(256 / 64) / math.log(64))


def longrope(
    path: Path, attention: float | None = USUAL, original: int | None = 64, **factors: list[float]
) -> tuple[Path, Any]:
    """A Phi-3 with longrope: the file, and transformers' model."""
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "short_factor": FACTORS["short"],
        "long_factor": FACTORS["long"],
        "original_max_position_embeddings": 64,
        "attention_factor": 1.0 if attention is None else attention,
    }
    tensors = {
        f"rope_factors_{name}.weight": np.array(values, np.float32) for name, values in (FACTORS | factors).items()
    }
    metadata = {
        "phi3.rope.scaling.original_context_length": original,
        "phi3.rope.scaling.attn_factor": attention,
    }
    settings = {"original_max_position_embeddings": 64, "rope_parameters": scaling}
    tiny = write(path, "phi3", metadata=metadata, tensors=tensors, **settings)
    return tiny.path, tiny.reference


@pytest.mark.parametrize("attention", [USUAL, None, 1.5])
def test_longrope_is_that_of_transformers(attention: float | None, tmp_path: Path) -> None:
    file, reference = longrope(tmp_path / "t.gguf", attention)
    folder = convert(file, tmp_path / "out")
    expected = logits(reference, PROMPT)
    assert np.abs(expected - logits(reference_model("phi3"), PROMPT)).max() > 0.1
    np.testing.assert_allclose(our_logits(folder), expected, atol=1e-3)
    scaling = json.loads((folder / "config.json").read_text())["rope_scaling"]
    assert scaling.get("attention_factor") == (None if attention == USUAL else attention or 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"long": [1.0] * 5}, "rope_factors_long.weight does not hold 6 factors"),
        ({"short": [1.0] * 5 + [0.0]}, "rope_factors_short.weight does not hold 6 factors"),
        ({"original": None}, "does not state phi3.rope.scaling.original_context_length"),
        ({"original": 512}, "from 512 to 256 tokens"),
    ],
)
def test_longrope_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file, _ = longrope(tmp_path / "t.gguf", **changes)
    _refused(file, tmp_path, message)


@pytest.mark.parametrize(
    ("arch", "metadata", "message"),
    [
        ("qwen3", {"qwen3.expert_count": 4}, "a mixture of experts of the architecture 'qwen3'"),
        ("qwen3moe", {"qwen3moe.expert_count": None}, "does not state qwen3moe.expert_count"),
        ("qwen3moe", {"qwen3moe.expert_used_count": 7}, "uses 7 of 6 experts"),
        ("qwen3moe", {"qwen3moe.expert_feed_forward_length": None}, "does not state qwen3moe.expert_feed_forward"),
        ("qwen3moe", {"qwen3moe.expert_gating_func": 2}, "a model with qwen3moe.expert_gating_func"),
        ("qwen3moe", {"qwen3moe.expert_weights_scale": 2.5}, "a model with qwen3moe.expert_weights_scale"),
        ("qwen3moe", {"qwen3moe.expert_count": 5}, "in the shape"),
        ("mixtral", {"llama.attention.key_length": 8, "llama.rope.dimension_count": 8}, "head_dim 8"),
        ("phi3", {"phi3.rope.dimension_count": 32}, "phi3.rope.dimension_count unlike its head size"),
        ("phi3", {"phi3.rope.dimension_count": 0}, "phi3.rope.dimension_count unlike its head size"),
        ("phi3", {"phi3.feed_forward_length": 48}, "in the shape"),
        ("olmo2", {"olmo2.attention.head_count_kv": 4}, "in the shape"),
        ("gemma", {"gemma.rope.scaling.type": "linear", "gemma.rope.scaling.factor": 2.0}, "scaled RoPE"),
        ("smollm3", {"smollm3.block_count": 6}, "lacks the tensor for model.layers.5"),
    ],
)
def test_contradictory_metadata_is_one_line(arch: str, metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    _refused(write(tmp_path / "t.gguf", arch, metadata=metadata).path, tmp_path, message)


def _refused(file: Path, place: Path, message: str) -> None:
    with pytest.raises(InputError) as caught:
        convert(file, place / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (place / "out").exists()
