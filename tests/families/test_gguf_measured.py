"""Architectures that no list names come through GGUF as mlx-lm's own model computes them, whatever llama.cpp stores."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf.constants import MODEL_ARCH_NAMES
from gguf.constants import GGMLQuantizationType as Kind
from helpers.gguf_cases import CASES
from helpers.gguf_written import logits, model_of, rounded, stored_tensors, write_model
from helpers.tiny_gguf import VOCABULARY
from mlx_lm.utils import load_model

import mlx_lqr
from mlx_lqr.convert import convert
from mlx_lqr.convert.architectures import ARCHITECTURES as ROWS
from mlx_lqr.convert.architectures import row
from mlx_lqr.errors import InputError

PROMPT = np.random.default_rng(7).integers(0, VOCABULARY, 24).tolist()


def converted(file: Path, **options: Any) -> Path:
    return convert(file, file.parent / "out", dtype="float32", **options)


def check(file: Path, expected: np.ndarray) -> None:
    model, _ = load_model(converted(file))
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits(model, PROMPT), expected, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_model_that_was_written(name: str, tmp_path: Path) -> None:
    model = model_of(CASES[name])
    check(write_model(tmp_path / "tiny.gguf", CASES[name], model), logits(model, PROMPT))


@pytest.mark.parametrize("name", ["qwen35", "gemma4", "lfm2moe"])
def test_the_model_is_accepted_and_computes_the_same(name: str, tmp_path: Path) -> None:
    module = model_of(CASES[name])
    model = mlx_lqr.load(write_model(tmp_path / "tiny.gguf", CASES[name], module), backend="mlx")
    along = model.logits_along([(PROMPT[:1], PROMPT[1:])])[0]  # type: ignore[attr-defined]
    np.testing.assert_allclose(along, logits(module, PROMPT), atol=2e-4)


@pytest.mark.parametrize(
    ("name", "kind", "part"),
    [
        ("qwen35", Kind.Q8_0, r"in_proj|mlp|embed"),
        ("deepseek3", Kind.Q4_1, r"mlp\.(gate|up)_proj|unembed_out|q_a_proj"),
        ("gpt-oss", Kind.MXFP4, r"experts\.\w+\.weight"),
    ],
)
def test_blocks_of_values_are_read_in_every_layout(name: str, kind: Kind, part: str, tmp_path: Path) -> None:
    module = model_of(CASES[name])
    rounded(module, kind, part)
    widths = {
        Kind.Q8_0: r"ffn|attn_(qkv|gate)|ssm_(alpha|beta)|token",
        Kind.Q4_1: r"ffn_(gate|up)\.|attn_(v_b|q_a)\.",
    }
    stored = widths.get(kind, "_exps.weight")
    file = write_model(
        tmp_path / "t.gguf",
        CASES[name],
        module,
        kind_of=lambda tensor: kind if re.search(stored, tensor) and "output" not in tensor else Kind.F32,
    )
    check(file, logits(module, PROMPT))


@pytest.mark.parametrize(
    ("whole", "parts"), [("attn_qkv", "attn_q attn_k attn_v"), ("ffn_gate_up_exps", "ffn_gate_exps ffn_up_exps")]
)
def test_what_is_stored_in_one_tensor_is_taken_apart(whole: str, parts: str, tmp_path: Path) -> None:
    case = CASES["qwen3vlmoe"]
    module = model_of(case)
    stored = stored_tensors(case, module)
    tensors: dict[str, np.ndarray | None] = {}
    for layer in range(2):
        names = [f"blk.{layer}.{part}.weight" for part in parts.split()]
        tensors |= dict.fromkeys(names) | {
            f"blk.{layer}.{whole}.weight": np.concatenate([stored[name] for name in names], axis=-2)
        }
    check(write_model(tmp_path / "t.gguf", case, module, tensors=tensors), logits(module, PROMPT))


def test_blocks_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    case = CASES["glm4moe"]
    module = model_of(case)
    file = write_model(
        tmp_path / "t.gguf",
        case,
        module,
        metadata={"glm4moe.block_count": 3, "glm4moe.nextn_predict_layers": 1},
        tensors={"blk.2.nextn.eh_proj.weight": np.zeros((64, 128), np.float32)},
    )
    check(file, logits(module, PROMPT))


def test_a_class_with_a_head_gets_the_embeddings_where_the_file_has_none(tmp_path: Path) -> None:
    case = CASES["glm4"]
    module: Any = model_of(case)
    module.lm_head.weight = module.model.embed_tokens.weight
    check(write_model(tmp_path / "t.gguf", case, module, tensors={"output.weight": None}), logits(module, PROMPT))


@pytest.mark.parametrize("name", ["gemma4moe", "granitehybrid", "deepseek3"])
def test_quantising_is_that_of_mlx_nn_quantize(name: str, tmp_path: Path) -> None:
    file = write_model(tmp_path / "t.gguf", CASES[name], model_of(CASES[name]))
    plain, _ = load_model(converted(file))
    ours, _ = load_model(convert(file, tmp_path / "quantised", dtype="float32", quantize=4, group_size=32))
    wanted = getattr(plain, "quant_predicate", None) or (lambda *_: True)

    def fits(path: str, part: nn.Module) -> Any:
        return hasattr(part, "to_quantized") and part.weight.shape[-1] % 32 == 0 and wanted(path, part)

    nn.quantize(plain, 32, 4, class_predicate=fits)
    np.testing.assert_allclose(logits(ours, PROMPT), logits(plain, PROMPT), atol=1e-5)


def test_what_the_model_keeps_in_float32_is_not_narrowed(tmp_path: Path) -> None:
    file = write_model(tmp_path / "t.gguf", CASES["deepseek3"], model_of(CASES["deepseek3"]))
    weights = mx.load(str(convert(file, tmp_path / "out", dtype="bfloat16") / "model.safetensors"))
    kinds = {name.rpartition(".")[2]: weight.dtype for name, weight in weights.items()}
    assert kinds["e_score_correction_bias"] == mx.float32
    assert kinds["weight"] == mx.bfloat16


ELSEWHERE = {
    "rope_traditional",  # rows are stored for halves, which is mlx-lm's own default
    "rope_parameters",  # says what rope_theta and rope_scaling say
    *("global_partial_rotary_factor", "partial_rotary_factor", "sliding_window_pattern"),  # gemma4: in rope_parameters
    *("layers_block_type", "layer_types", "time_step_min", "time_step_max"),  # nemotron_h: in hybrid_override_pattern
    *("initializer_range", "mamba_chunk_size", "mamba_use_mlp", "mlp_expansion_factor"),  # falcon_h1 does not read them
    *("moe_capacity", "moe_use_aux_free"),  # nor ernie4_5_moe these
    "ssm_state_size",  # mamba2: state_size
}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.nested is None])
def test_a_converted_config_leaves_nothing_to_defaults(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = converted(write_model(tmp_path / "t.gguf", case, model_of(case)))
    config = json.loads((folder / "config.json").read_text())
    read = {field.name for field in fields(importlib.import_module(f"mlx_lm.models.{case.model_type}").ModelArgs)}
    without = {name for name in read if "expert" in name or "moe" in name or "group" in name or "topk" in name}
    optional = without if not case.arch.endswith("moe") and "expert_count" not in case.keys else set()
    assert read - config.keys() - optional - {"routed_scaling_factor"} <= ELSEWHERE


@pytest.mark.parametrize(
    ("name", "metadata", "tensors", "message"),
    [
        ("olmo3", {"olmo2.attention.sliding_window_pattern": [True]}, {}, "for each of its 2 blocks"),
        (
            "glm4",
            {"glm4.rope.scaling.type": "linear", "glm4.rope.scaling.factor": 2.0},
            {},
            "mlx-lm's glm4 does not do",
        ),
        ("glm4", {"glm4.rope.dimension_count": 32}, {}, "rope.dimension_count unlike its head size"),
        ("ministral3", {"mistral3.rope.scaling.type": "none"}, {}, "does not scale RoPE by YaRN"),
        ("minicpm", {"minicpm.logit_scale": 0.0}, {}, "states sizes that no model has"),
        ("gemma3n", {"gemma3n.attention.sliding_window_pattern": "x"}, {}, "sliding_window_pattern as 'x'"),
        ("gemma4moe", {}, {"blk.3.ffn_gate_up_exps.weight": np.zeros(7, np.float32)}, "holds the tensor"),
        ("cohere2", {"cohere2.logit_scale": None}, {}, "does not state cohere2.logit_scale"),
        ("granite", {"granite.attention.clamp_kqv": 8.0}, {}, "a model with granite.attention.clamp_kqv"),
        ("gemma4", {}, {"rope_freqs.weight": None}, "lacks the tensor rope_freqs.weight"),
        ("gemma4", {}, {"rope_freqs.weight": np.ones(8, np.float32)}, "does not hold 16 factors"),
        ("qwen35", {"qwen35.ssm.state_size": None}, {}, "does not state qwen35.ssm.state_size"),
        ("qwen35", {"qwen35.ssm.group_count": 3}, {}, "in the shape"),
        ("qwen35", {"qwen35.attention.recurrent_layers": [False, True]}, {}, "irregular order"),
        (
            "deepseek3",
            {"deepseek2.attention.key_length_mla": None},
            {},
            "does not state deepseek2.attention.key_length_mla",
        ),
        ("deepseek2", {"deepseek2.expert_weights_norm": True}, {}, "divides the weights of experts"),
        ("glm4moe", {"glm4moe.block_count": 2**31, "glm4moe.nextn_predict_layers": 2**31 - 2}, {}, "blocks but holds"),
        ("glm4moe", {"glm4moe.nextn_predict_layers": 2}, {}, "states 2 blocks but holds"),
        ("glm4moe", {"glm4moe.expert_gating_func": 1}, {}, "glm4moe.expert_gating_func 1"),
        ("gpt-oss", {"gpt-oss.expert_used_count": 5}, {}, "uses 5 of 4 experts"),
        ("llama4", {"llama4.expert_used_count": 2}, {}, "uses 2 experts for a token"),
        ("mamba2", {"mamba2.ssm.group_count": 2}, {}, "norms the state by groups"),
        ("kimi-linear", {"kimi-linear.attention.head_count_kv": [1, 1]}, {}, "that mlx-lm's kimi_linear can build"),
        ("jamba", {"jamba.expert_count": 4}, {}, "has experts"),
        ("nemotron_h", {}, {"blk.0.ffn_up.weight": np.zeros((96, 64), np.float32)}, "layer 0 that is not of one kind"),
        ("apertus", {"xielu.alpha_p": None}, {}, "does not state apertus.xielu.alpha_p for each"),
        ("lfm2", {}, {"blk.0.ssm_a": np.zeros(4, np.float32)}, "holds the tensor 'blk.0.ssm_a'"),
        ("mamba", {}, {"blk.0.ssm_a": np.ones((128, 16), np.float32)}, "ssm_a holds values that are not negative"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    name: str, metadata: dict[str, Any], tensors: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = write_model(tmp_path / "t.gguf", CASES[name], model_of(CASES[name]), metadata=metadata, tensors=tensors)
    with pytest.raises(InputError) as caught:
        converted(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_rope_of_a_llama_4_that_switches_at_one_wavelength_is_recovered(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    }
    case = CASES["llama4"]
    module = model_of(case, rope_scaling=scaling)
    factors = np.array([1.0] * 6 + [16.0] * 2, np.float32)  # of wavelengths up to 5,400, and from 21,000 on
    file = write_model(tmp_path / "t.gguf", case, module, tensors={"rope_freqs.weight": factors})
    check(file, logits(module, PROMPT))
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["rope_scaling"] == scaling


def test_the_documentation_lists_what_converts() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    listed = re.search(r"in the file\) convert: (.*?)\.\n\n", page, re.DOTALL)
    assert listed is not None
    assert re.findall(r"`(.+?)`", listed[1]) == sorted({known.name for known in ROWS})


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    file = write_model(tmp_path / "t.gguf", replace(CASES["glm4"], arch="bert"), model_of(CASES["glm4"]))
    with pytest.raises(
        InputError, match=r"'bert', which cannot be converted: give the original model .*gpt-oss.*llama"
    ):
        converted(file)


def test_an_architecture_that_the_gguf_package_is_too_old_for_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_model(tmp_path / "t.gguf", CASES["gemma4"], model_of(CASES["gemma4"]))
    older = {key: name for key, name in MODEL_ARCH_NAMES.items() if name != "gemma4"}
    monkeypatch.setattr(row, "MODEL_ARCH_NAMES", older)
    with pytest.raises(InputError, match="does not know the architecture 'gemma4': pip install -U gguf"):
        converted(file)


def test_what_mlx_lm_has_no_use_for_is_said(tmp_path: Path) -> None:
    case = CASES["ernie4_5-moe"]
    module = model_of(case)
    bias = {"blk.1.exp_probs_b.bias": np.ones((1, 4), np.float32)}
    file = write_model(tmp_path / "t.gguf", case, module, tensors=bias)
    with pytest.warns(RuntimeWarning, match="chooses experts without the correction in t.gguf"):
        check(file, logits(module, PROMPT))
