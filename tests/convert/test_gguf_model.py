"""A GGUF file's model computes in MLX what transformers computes with the same weights."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind
from helpers.page import PROSE
from helpers.real_models import reading_at_once
from helpers.tiny_gguf import ARCHITECTURES, K_SIZES, VOCABULARY, logits, reference_model, write
from mlx_lm.utils import load_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import mlx_lqr
from mlx_lqr.backends.checkpoint.families import SETTINGS
from mlx_lqr.convert import convert
from mlx_lqr.convert.rope import recover_llama3
from mlx_lqr.errors import InputError

_GGUF_READER = gguf.GGUFReader
PROMPT = np.random.default_rng(7).integers(0, VOCABULARY, 48).tolist()


def mlx_logits(folder: Path, tokens: list[int]) -> np.ndarray:
    model, _ = load_model(folder)
    return np.array(model(mx.array([tokens]))[0].astype(mx.float32))


@functools.cache
def _reader(path: str) -> gguf.GGUFReader:
    """The gguf package's reader, which takes seconds for Gemma's vocabulary; transformers asks for it twice."""
    with reading_at_once():
        reader = _GGUF_READER(path)
    for key in ("merges", "scores", "token_type"):  # not about the model, and as slow again to interpret
        reader.fields.pop(f"tokenizer.ggml.{key}", None)
    return reader


def transformers_gguf(path: Path) -> Any:
    """The model as transformers' own GGUF loader makes it; `from_pretrained(gguf_file=...)` would need accelerate."""
    with pytest.MonkeyPatch.context() as patch, no_init_weights():
        patch.setattr(gguf, "GGUFReader", lambda file: _reader(str(file)))
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        config._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config).float().eval()
        weights = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1, Kind.Q4_K, Kind.Q6_K])
def test_logits_equal_transformers_with_the_same_weights(arch: str, kind: Kind, tmp_path: Path) -> None:
    sizes = K_SIZES if "_K" in kind.name else {}
    tiny = write(tmp_path / "tiny.gguf", arch, kind, **sizes)
    folder = convert(tiny.path, tmp_path / "out", dtype="float32")
    expected = logits(tiny.reference, PROMPT)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(mlx_logits(folder, PROMPT), expected, atol=1e-3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_equal_transformers_own_gguf_loader(arch: str, tmp_path: Path) -> None:
    tiny = write(tmp_path / "tiny.gguf", arch, Kind.Q8_0)
    folder = convert(tiny.path, tmp_path / "out", dtype="float32")
    np.testing.assert_allclose(mlx_logits(folder, PROMPT), logits(transformers_gguf(tiny.path), PROMPT), atol=1e-3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_transformers_reads_the_converted_folder(arch: str, tmp_path: Path) -> None:
    tiny = write(tmp_path / "tiny.gguf", arch, Kind.F16)
    folder = convert(tiny.path, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert model.dtype == torch.float16
    np.testing.assert_allclose(logits(model.float(), PROMPT), logits(tiny.reference, PROMPT), atol=5e-2, rtol=5e-3)


def test_sliding_window_matters_to_the_gemma3_test(tmp_path: Path) -> None:
    tiny = write(tmp_path / "tiny.gguf", "gemma3")
    wide = reference_model("gemma3", sliding_window=1000)
    assert np.abs(logits(tiny.reference, PROMPT) - logits(wide, PROMPT)).max() > 0.1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_converted_config_leaves_nothing_to_defaults(arch: str, tmp_path: Path) -> None:
    config = json.loads((convert(write(tmp_path / "t.gguf", arch).path, tmp_path / "out") / "config.json").read_text())
    assert SETTINGS[config["model_type"]].keys() | {"rope_theta", "rope_scaling"} <= config.keys()


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_gemmas_are_right_beyond_their_window(arch: str, backend: Any, tmp_path: Path) -> None:
    tiny = write(tmp_path / "tiny.gguf", arch, sliding_window=8)
    model = mlx_lqr.load(convert(tiny.path, tmp_path / "out", dtype="float32"), backend=backend)
    expected = logits(tiny.reference, PROMPT)
    np.testing.assert_allclose(model.logits_along([(PROMPT[:1], PROMPT[1:])])[0], expected, atol=1e-3)
    np.testing.assert_allclose(model.logits(PROMPT), expected[-1], atol=1e-3)


@pytest.mark.parametrize("pattern", [2, [True, False, True, False]])
def test_gemma3_pattern_of_sliding_layers_is_read(pattern: Any, tmp_path: Path) -> None:
    layers = ["sliding_attention", "full_attention"] * 2
    key = {"gemma3.attention.sliding_window_pattern": pattern}
    tiny = write(tmp_path / "t.gguf", "gemma3", metadata=key, num_hidden_layers=4, layer_types=layers)
    folder = convert(tiny.path, tmp_path / "out")
    np.testing.assert_allclose(mlx_logits(folder, PROMPT), logits(tiny.reference, PROMPT), atol=1e-3)


def test_gemma3_with_an_irregular_pattern_is_refused(tmp_path: Path) -> None:
    key = {"gemma3.attention.sliding_window_pattern": [True, False, False, True]}
    tiny = write(tmp_path / "t.gguf", "gemma3", metadata=key, num_hidden_layers=4, layer_types=None)
    with pytest.raises(InputError, match="irregular"):
        convert(tiny.path, tmp_path / "out")


@pytest.mark.parametrize(("layers", "expected"), [(46, 32), (2, 256)])
def test_gemma2_query_scale_follows_the_model_size(layers: int, expected: int, tmp_path: Path) -> None:
    tiny = write(tmp_path / "t.gguf", "gemma2", num_hidden_layers=layers)
    folder = convert(tiny.path, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["query_pre_attn_scalar"] == expected


def test_attention_biases_of_a_llama_are_permuted_too(tmp_path: Path) -> None:
    tiny = write(tmp_path / "t.gguf", "llama", attention_bias=True, mlp_bias=True)
    folder = convert(tiny.path, tmp_path / "out")
    np.testing.assert_allclose(mlx_logits(folder, PROMPT), logits(tiny.reference, PROMPT), atol=1e-3)


def test_head_size_of_its_own_is_kept(tmp_path: Path) -> None:
    tiny = write(tmp_path / "t.gguf", "llama", head_dim=32)
    folder = convert(tiny.path, tmp_path / "out")
    np.testing.assert_allclose(mlx_logits(folder, PROMPT), logits(tiny.reference, PROMPT), atol=1e-3)


def llama3_factors(head_dim: int, theta: float, scaling: dict[str, float]) -> np.ndarray:
    """rope_freqs.weight, in the words of llama.cpp's converter."""
    low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    factors = []
    for freq in 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)):
        wavelen = 2 * math.pi / freq
        if wavelen < high:
            factors.append(1)
        elif wavelen > low:
            factors.append(scaling["factor"])
        else:
            smooth = scaling["original_max_position_embeddings"] / wavelen - scaling["low_freq_factor"]
            smooth = smooth / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return torch.tensor(factors, dtype=torch.float32).numpy()


def scaled_rope(kind: str, **settings: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5e4, **settings}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 16,
}


@pytest.mark.parametrize(
    ("metadata", "tensors", "scaling"),
    [
        (LINEAR, {}, scaled_rope("linear", factor=4.0)),
        ({"llama.rope.scale_linear": 4.0}, {}, scaled_rope("linear", factor=4.0)),
        (YARN, {}, scaled_rope("yarn", factor=4.0, original_max_position_embeddings=16)),
        ({}, {"rope_freqs.weight": llama3_factors(64, 5e4, LLAMA3)}, scaled_rope("llama3", **LLAMA3)),
    ],
    ids=["linear", "linear-2023", "yarn", "llama3"],
)
def test_rope_scaling_is_that_of_transformers(
    metadata: dict[str, Any], tensors: dict[str, np.ndarray], scaling: dict[str, Any], tmp_path: Path
) -> None:
    tiny = write(tmp_path / "t.gguf", "llama", metadata=metadata, tensors=tensors, head_dim=64, **scaling)
    folder = convert(tiny.path, tmp_path / "out")
    unscaled = reference_model("llama", head_dim=64)
    expected = logits(tiny.reference, PROMPT)
    assert np.abs(expected - logits(unscaled, PROMPT)).max() > 0.1  # the scaling matters
    np.testing.assert_allclose(mlx_logits(folder, PROMPT), expected, atol=1e-3)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize(("high", "original"), [(4.0, 8192), (8.0, 8192), (4.0, 16384)])
def test_llama3_scaling_is_recovered_from_its_factors(head_dim: int, factor: float, high: float, original: int) -> None:
    scaling = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    assert recover_llama3(llama3_factors(head_dim, 5e5, scaling), head_dim, 5e5) == {"rope_type": "llama3", **scaling}


def test_llama3_scaling_with_another_low_factor_gives_the_same_frequencies() -> None:
    scaling = {**LLAMA3, "low_freq_factor": 2.0, "original_max_position_embeddings": 8192}
    factors = llama3_factors(128, 5e5, scaling)
    recovered = recover_llama3(factors, 128, 5e5)
    np.testing.assert_allclose(llama3_factors(128, 5e5, recovered), factors, rtol=1e-5)


def test_factors_of_another_formula_are_refused() -> None:
    factors = llama3_factors(128, 5e5, LLAMA3 | {"original_max_position_embeddings": 8192})
    factors[30] *= 1.01
    with pytest.raises(InputError, match="Llama 3"):
        recover_llama3(factors, 128, 5e5)


@pytest.mark.parametrize(
    ("kind", "expected"), [(Kind.F32, mx.float32), (Kind.F16, mx.float16), (Kind.BF16, mx.bfloat16)]
)
def test_unquantised_file_keeps_its_dtype(kind: Kind, expected: mx.Dtype, tmp_path: Path) -> None:
    folder = convert(write(tmp_path / "t.gguf", "llama", kind).path, tmp_path / "out")
    weights = mx.load(str(folder / "model.safetensors"))
    assert {weight.dtype for weight in weights.values()} == {expected}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == str(expected).removeprefix("mlx.core.")


@pytest.mark.parametrize(("device", "expected"), [(mx.cpu, mx.float32), (mx.gpu, mx.bfloat16)])
def test_quantised_file_gets_the_dtype_that_suits_the_device(
    device: Any, expected: mx.Dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = write(tmp_path / "t.gguf", "llama", Kind.Q8_0)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device, 0))
    folder = convert(tiny.path, tmp_path / "out")
    assert mx.load(str(folder / "model.safetensors"))["model.norm.weight"].dtype == expected


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_quantising_is_that_of_mlx_nn_quantize(bits: int, arch: str, tmp_path: Path) -> None:
    tiny = write(tmp_path / "t.gguf", arch, intermediate_size=128)
    plain, _ = load_model(convert(tiny.path, tmp_path / "plain"))
    folder = convert(tiny.path, tmp_path / "quantised", quantize=bits)
    mx_nn_quantize(plain, bits)
    np.testing.assert_array_equal(mlx_logits(folder, PROMPT), np.array(plain(mx.array([PROMPT]))[0]))
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": bits, "mode": "affine"} == config["quantization_config"]


def mx_nn_quantize(model: Any, bits: int) -> None:
    import mlx.nn as nn

    nn.quantize(model, group_size=64, bits=bits)


def test_rows_that_do_not_divide_get_smaller_groups_or_none_and_the_config_says_so(tmp_path: Path) -> None:
    tiny = write(tmp_path / "t.gguf", "llama", intermediate_size=96)  # 96 divides by 32 but not by 64
    folder = convert(tiny.path, tmp_path / "out", quantize=8)
    entry = json.loads((folder / "config.json").read_text())["quantization"]
    assert entry["model.layers.0.mlp.down_proj"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert "model.layers.0.mlp.up_proj" not in entry
    model, _ = load_model(folder)
    assert model.layers[0].mlp.down_proj.group_size == 32
    assert np.abs(mlx_logits(folder, PROMPT) - logits(tiny.reference, PROMPT)).max() < 0.5

    tiny = write(tmp_path / "u.gguf", "llama", intermediate_size=80)
    folder = convert(tiny.path, tmp_path / "out2", quantize=4)
    entry = json.loads((folder / "config.json").read_text())["quantization"]
    assert entry["model.layers.0.mlp.down_proj"] is False
    assert mx.load(str(folder / "model.safetensors"))["model.layers.0.mlp.down_proj.weight"].dtype == mx.float32
    mlx_logits(folder, PROMPT)


def test_progress_is_reported_for_every_tensor(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    convert(write(tmp_path / "t.gguf", "llama").path, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert calls == [("Writing", done, len(calls)) for done in range(1, len(calls) + 1)]
    assert len(calls) == 2 * 9 + 3


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = write(tmp_path / "t.gguf", "llama")
    monkeypatch.setattr("mlx_lqr.convert.write.SHARD_BYTES", 100_000)
    folder = convert(tiny.path, tmp_path / "out")
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 1
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in tiny.reference.parameters())
    np.testing.assert_allclose(mlx_logits(folder, PROMPT), logits(tiny.reference, PROMPT), atol=1e-3)


def real_logits(model: Any, tokens: list[int], positions: list[int]) -> np.ndarray:
    """An mlx-lm model's logits at some positions, (positions, vocabulary); all 700 of Gemma's would be 0.7 GB."""
    hidden = model.model(mx.array([tokens]))[0, mx.array(positions)]
    return np.array(model.model.embed_tokens.as_linear(hidden))


def real_reference(model: Any, tokens: list[int], positions: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens]), logits_to_keep=torch.tensor(positions)).logits[0].numpy()


POSITIONS = [*range(0, 700, 9), *range(690, 700)]


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2_gguf: Path, smollm2_folder: Path) -> None:
    model, tokenizer = mlx_lm.load(str(smollm2_folder))
    tokens = (tokenizer.encode(PROSE) * 2)[:700]
    assert len(tokens) == 700
    expected = real_reference(transformers_gguf(smollm2_gguf), tokens, POSITIONS)
    np.testing.assert_allclose(real_logits(model, tokens, POSITIONS), expected, atol=1e-3)
    assert tokenizer.eos_token_ids == {0, 2}


@pytest.mark.slow
def test_gemma3_equals_transformers_past_its_sliding_window(gemma3_gguf: Path, gemma3_folder: Path) -> None:
    model, tokenizer = mlx_lm.load(str(gemma3_folder))
    tokens = (tokenizer.encode(PROSE) * 3)[:700]  # the window is 512
    assert len(tokens) == 700
    expected = real_reference(transformers_gguf(gemma3_gguf), tokens, POSITIONS)
    np.testing.assert_allclose(real_logits(model, tokens, POSITIONS), expected, atol=1e-3)
    assert tokenizer.eos_token_ids == {1, 106}
