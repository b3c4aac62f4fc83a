"""LoRA adapters of models that are on no list, against mlx-lm's own loader and against PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers.architectures import CONFIGS, folder_of
from helpers.controllers import controller_for
from helpers.tiny_configs import relative
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save_file

import mlx_lqr
from mlx_lqr.backends.mlx.adapter import OF_MLX_LM
from mlx_lqr.backends.protocol import Model
from mlx_lqr.errors import InputError
from mlx_lqr.loading import adopt

PROMPT = [5, 9, 2, 33, 7, 51, 20, 11, 3]
WIDE = {"hidden_size": 64, "intermediate_size": 64}
"""Which a router that is packed in groups of 64 needs"""
CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "experts and gated deltas": (
        "qwen3_next",
        ["linear_attn.in_proj_qkvz", "self_attn.q_proj", "mlp.switch_mlp.up_proj", "model.embed_tokens", "lm_head"],
        {},
    ),
    "convolutions": ("lfm2", ["conv.in_proj", "feed_forward.w1", "self_attn.out_proj"], {}),
    "experts with biases": ("gpt_oss", ["mlp.experts.gate_proj", "mlp.experts.down_proj", "self_attn.k_proj"], {}),
    "embeddings of another name": ("mamba2", ["mixer.in_proj", "backbone.embeddings"], {}),
    "DoRA": ("glm4", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"], {"use_dora": True}),
    "packed": ("gpt_oss", ["mlp.experts.gate_proj", "mlp.experts.down_proj", "self_attn.k_proj"], {"bits": 4, **WIDE}),
    "packed DoRA": ("glm4", ["self_attn.q_proj", "mlp.down_proj"], {"bits": 4, "use_dora": True}),
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_LQR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def load(folder: Path, adapter: Path | None = None) -> Model:
    return mlx_lqr.load(folder, backend="mlx", dtype="float32", adapter=adapter)


def of_mlx_lm(folder: Path, place: Path, keys: list[str], *, use_dora: bool = False) -> Path:
    """A random adapter of mlx-lm's trainer, for the last three of four layers."""
    module, _ = load_model(folder)
    parameters = {"rank": 4, "scale": 2.5, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(module, 3, parameters, use_dora=use_dora)
    mx.random.seed(3)
    weights = {
        name: 1.3 * value if name.endswith(".m") else 0.2 * mx.random.normal(value.shape)
        for name, value in tree_flatten(module.parameters())
        if name.rpartition(".")[2] in ("lora_a", "lora_b", "m")
    }
    kind = "dora" if use_dora else "lora"
    config = {"fine_tune_type": kind, "num_layers": 3, "lora_parameters": parameters, "model": "a/tiny-model"}
    return written(place, config, {name: np.array(value) for name, value in weights.items()})


def written(place: Path, config: dict[str, Any], weights: dict[str, np.ndarray], peft: bool = False) -> Path:
    place.mkdir(exist_ok=True)
    (place / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, place / ("adapter_model.safetensors" if peft else "adapters.safetensors"))
    return place


@pytest.mark.parametrize("case", CASES)
def test_mlx_lms_adapters_do_what_mlx_lm_does(case: str, tmp_path: Path) -> None:
    family, keys, options = CASES[case]
    use_dora = "use_dora" in options
    folder = folder_of(family, tmp_path / "model", **{key: options[key] for key in options if key != "use_dora"})
    adapter = of_mlx_lm(folder, tmp_path / "mine", keys, use_dora=use_dora)
    theirs = load_adapters(load_model(folder)[0], str(adapter))
    theirs.eval()
    expected = np.array(theirs(mx.array([PROMPT]))[0, -1])
    model, plain = load(folder, adapter), load(folder)
    assert relative(model.logits(PROMPT), expected) < 1e-4
    assert relative(plain.logits(PROMPT), expected) > 0.05
    adopted = adopt(theirs)
    assert (model.name, adopted.name) == ("model + adapter mine", f"{family} + adapter {OF_MLX_LM}")
    assert adopted.fingerprint == model.fingerprint != plain.fingerprint
    controller = controller_for(model, cost="feature")
    assert np.abs(controller.gain - controller_for(plain, cost="feature").gain).max() > 1e-3
    for other in (model, adopted):
        assert relative(controller_for(other, cost="feature").gain, controller.gain) < 1e-3
    with pytest.raises(InputError, match="adapter mine"):
        controller.check_model(plain)


def test_layers_that_mlx_lm_trained_whole(tmp_path: Path) -> None:
    """Norms, and arrays that are no layer's weight, too."""
    folder = folder_of("qwen3_next", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    changed = {name: 1.2 * values for name, values in weights.items() if ".layers.2." in name}
    assert "model.layers.2.linear_attn.A_log" in changed
    adapter = written(tmp_path / "full", {"fine_tune_type": "full", "num_layers": 2}, changed)
    expected = np.array(load_adapters(load_model(folder)[0], str(adapter))(mx.array([PROMPT]))[0, -1])
    assert relative(load(folder, adapter).logits(PROMPT), expected) < 1e-4


PEFTS: dict[str, tuple[str, dict[str, Any]]] = {
    "convolutions": ("lfm2", {"target_modules": ["q_proj", "w2", "in_proj"]}),
    "DoRA": ("glm4", {"target_modules": ["v_proj", "gate_up_proj"], "use_dora": True}),
    "norms": ("glm4", {"target_modules": ["v_proj"], "modules_to_save": ["post_self_attn_layernorm"]}),
    "a part for text": ("gemma3", {"target_modules": r".*language_model.*(q_proj|down_proj)"}),
}
NOT_IN_MLX_LM: dict[str, Any] = {
    "pad_token_id": 0,
    "vision_config": {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 1,
}
"""Sizes that transformers asks for"""


def of_peft(family: str, options: dict[str, Any], place: Path) -> tuple[Path, Path, np.ndarray]:
    """A random model of transformers and an adapter of PEFT for it, and their logits (V,) after PROMPT."""
    peft = pytest.importorskip("peft")
    import transformers

    given = {key: value for key, value in NOT_IN_MLX_LM.items() if family == "gemma3" or key == "pad_token_id"}
    config = transformers.AutoConfig.for_model(**CONFIGS[family] | given)
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(weight + 0.2 * torch.randn_like(weight))
    module.save_pretrained(place / "model")
    words = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"w": 0}, "unk_token": "w"}}
    (place / "model" / "tokenizer.json").write_text(json.dumps(words))
    adapted = peft.get_peft_model(module, peft.LoraConfig(r=4, **options))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                change = torch.randn_like(weight)
                weight.copy_(0.3 * change if "lora_" in name and "magnitude" not in name else weight + 0.1 * change)
        adapted.save_pretrained(place / "mine")
        logits = adapted.eval()(torch.tensor([PROMPT])).logits[0, -1].numpy()
    return place / "model", place / "mine", logits


@pytest.mark.parametrize("case", PEFTS)
def test_pefts_adapters_do_what_peft_does(case: str, tmp_path: Path) -> None:
    family, options = PEFTS[case]
    folder, adapter, expected = of_peft(family, options, tmp_path)
    assert relative(load(folder, adapter).logits(PROMPT), expected) < 2e-4
    assert relative(load(folder).logits(PROMPT), expected) > 0.05


MATRICES = {"lora_A": np.ones((4, 32), np.float32), "lora_B": np.ones((16, 4), np.float32)}


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("qwen3_next", "model.layers.0.self_attn.q_proj"),  # whose first layer has no attention
        ("qwen3_next", "model.layers.0.mlp.experts"),  # all experts in one tensor
        ("gpt_oss", "model.layers.0.mlp.router"),  # of another shape
        ("deepseek_v3", "model.layers.0.self_attn.kv_b_proj"),  # which mlx-lm cuts into two
    ],
)
def test_what_a_module_has_in_another_form_is_refused(family: str, module: str, tmp_path: Path) -> None:
    folder = folder_of(family, tmp_path / "model")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_parameters": ["mlp.experts.down_proj"]}
    weights = {f"base_model.model.{module}.{part}.weight": values for part, values in MATRICES.items()}
    with pytest.raises(InputError, match=r"in another form, or not at all: merge|is for a .* of shape") as refusal:
        load(folder, written(tmp_path / "mine", config, weights, peft=True))
    assert "\n" not in str(refusal.value)
