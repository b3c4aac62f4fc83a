"""LoRA adapters of both formats on both backends, against mlx-lm's own loader and against PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from helpers.backends import BACKENDS, tiny_folder
from helpers.command_line import refused, run
from helpers.tiny_configs import PROMPT, plain_logits, relative, weights_folder
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model, quantize_model
from safetensors.numpy import load_file, save_file

import mlx_lqr
from mlx_lqr.backends.mlx.blocks import dequantized
from mlx_lqr.backends.protocol import Model
from mlx_lqr.errors import InputError
from mlx_lqr.loading import adopt
from mlx_lqr.methods.running import law_on
from mlx_lqr.runtime.__main__ import main as run_light

SCALE = 2.5
Made = tuple[Path, Path]
"""The folders of a model and of its adapter"""
LAYERS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
ALL = {
    "llama": [*LAYERS, "model.embed_tokens"],  # which is the head too
    "qwen2": [*LAYERS, "lm_head"],
    "gemma3_text": LAYERS,
    "phi3": ["self_attn.qkv_proj", "mlp.gate_up_proj"],
    "mixtral": ["block_sparse_moe.switch_mlp.up_proj", "block_sparse_moe.gate"],
    "qwen3_moe": ["self_attn.q_proj", "mlp.switch_mlp.gate_proj", "mlp.switch_mlp.down_proj", "mlp.gate"],
}


def load(folder: Path, backend: str, adapter: Path | None = None) -> Model:
    return mlx_lqr.load(folder, backend=backend, dtype="float32", adapter=adapter)  # type: ignore[arg-type]


def of_mlx_lm(folder: Path, place: Path, keys: list[str], kind: str = "lora", num_layers: int = 2) -> Path:
    """A random adapter of mlx-lm's trainer."""
    module, _ = load_model(folder)
    parameters = {"rank": 4, "scale": SCALE, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(module, num_layers, parameters, use_dora=kind == "dora")
    mx.random.seed(3)
    weights = {
        name: 1.3 * value if name.endswith(".m") else 0.2 * mx.random.normal(value.shape)
        for name, value in tree_flatten(module.parameters())
        if name.rpartition(".")[2] in ("lora_a", "lora_b", "m")
    }
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters, "model": "a/tiny-model"}
    return written(place, config, {name: np.array(value) for name, value in weights.items()})


def written(place: Path, config: dict[str, Any], weights: dict[str, np.ndarray], peft: bool = False) -> Path:
    place.mkdir(exist_ok=True)
    (place / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, place / ("adapter_model.safetensors" if peft else "adapters.safetensors"))
    return place


def logits_of_mlx_lm(folder: Path, adapter: Path) -> np.ndarray:
    """(V,) after PROMPT, by mlx-lm alone."""
    module, _ = load_model(folder)
    module = load_adapters(module, str(adapter))
    module.eval()
    module.set_dtype(mx.float32)
    return np.array(module(mx.array([PROMPT]))[0, -1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("family", "kind"), [*((family, "lora") for family in ALL), ("llama", "dora")])
def test_mlx_lms_adapters_do_what_mlx_lm_does(family: str, kind: str, backend: str, tmp_path: Path) -> None:
    folder = tiny_folder(family)
    adapter = of_mlx_lm(folder, tmp_path / "mine", ALL[family], kind)
    model = load(folder, backend, adapter)
    expected = logits_of_mlx_lm(folder, adapter)
    assert relative(model.logits(PROMPT), expected) < 1e-4
    assert relative(load(folder, backend).logits(PROMPT), expected) > 0.05
    assert model.name == f"{folder.name} + adapter mine"


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_mlx_lm_trained_whole(backend: str, tmp_path: Path) -> None:
    folder = tiny_folder("qwen3_moe")
    weights = load_file(folder / "model.safetensors")
    changed = {name: values * 1.2 for name, values in weights.items() if ".layers.2." in name}
    adapter = written(tmp_path / "full", {"fine_tune_type": "full", "num_layers": 1}, changed)
    assert relative(load(folder, backend, adapter).logits(PROMPT), logits_of_mlx_lm(folder, adapter)) < 1e-4


T = ["q_proj", "v_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PEFTS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("llama", {"target_modules": T, "lora_alpha": 10}),
    "patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 3},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 40},
        },
    ),
    "DoRA": ("llama", {"target_modules": T, "use_dora": True, "bias": "all", "modules_to_save": ["lm_head"]}),
    "embeddings": ("llama", {"target_modules": [*T, "embed_tokens", "lm_head"]}),
    "modules": (
        "llama",
        {"target_modules": T, "modules_to_save": ["embed_tokens", "norm"], "layers_to_transform": [1]},
    ),
    "biases": ("qwen2", {"target_modules": T, "bias": "all"}),
    "biases of DoRA": ("qwen2", {"target_modules": T, "bias": "lora_only", "use_dora": True}),
    "Gemma 3": ("gemma3_text", {"target_modules": T}),
    "experts": ("mixtral", {"target_modules": T, "target_parameters": EXPERTS}),
    "experts' outputs": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}),
    "experts by their old names": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
}


def of_peft(family: str, options: dict[str, Any], place: Path) -> tuple[Path, np.ndarray]:
    """A random adapter of PEFT, and the logits (V,) after PROMPT by PEFT alone."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(weights_folder(family), dtype=torch.float32)
    adapted = peft.get_peft_model(module, peft.LoraConfig(**{"r": 4, **options}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                change = torch.randn_like(weight)
                weight.copy_(0.3 * change if "lora_" in name and "magnitude" not in name else weight + 0.1 * change)
        adapted.save_pretrained(place)
        logits = adapted.eval()(torch.tensor([PROMPT])).logits[0, -1].numpy()
    return place, logits


@pytest.mark.parametrize("case", PEFTS)
def test_pefts_adapters_do_what_peft_does(case: str, tmp_path: Path) -> None:
    family, options = PEFTS[case]
    adapter, expected = of_peft(family, options, tmp_path / "mine")
    models = [load(weights_folder(family), backend, adapter) for backend in BACKENDS]
    for model in models:
        assert relative(model.logits(PROMPT), expected) < 1e-4
    assert relative(plain_logits(weights_folder(family))[-1], expected) > 0.05
    assert len({model.fingerprint for model in models}) == 1


def test_single_experts_of_older_versions_of_peft(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    folder = tiny_folder("mixtral")
    a, b = (random.normal(size=shape).astype(np.float32) for shape in ((4, 32), (64, 4)))
    place = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w3"
    weights = {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
    adapter = written(tmp_path / "expert", {"peft_type": "LORA", "r": 4, "lora_alpha": 8}, weights, peft=True)
    merged = load_file(folder / "model.safetensors")
    merged["model.layers.1.block_sparse_moe.switch_mlp.up_proj.weight"][2] += 2 * b @ a
    shutil.copytree(folder, tmp_path / "merged")
    save_file(merged, tmp_path / "merged" / "model.safetensors", metadata={"format": "mlx"})
    for backend in BACKENDS:
        expected = load(tmp_path / "merged", backend).logits(PROMPT)
        assert relative(load(folder, backend, adapter).logits(PROMPT), expected) < 1e-4


def in_pefts_format(adapter: Path, place: Path) -> Path:
    """mlx-lm's adapter of linear layers, as PEFT would write it."""
    weights: dict[str, np.ndarray] = {}
    for name, values in load_file(adapter / "adapters.safetensors").items():
        module, _, part = name.rpartition(".")
        weights[f"base_model.model.{module}.{part.replace('_a', '_A').replace('_b', '_B')}.weight"] = values.T.copy()
    return written(place, {"peft_type": "LORA", "r": 4, "lora_alpha": 4 * SCALE}, weights, peft=True)


def test_an_adapter_is_the_same_in_both_formats(tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    one = of_mlx_lm(folder, tmp_path / "one", LAYERS)
    other = in_pefts_format(one, tmp_path / "other")
    models = [load(folder, backend, adapter) for backend in BACKENDS for adapter in (one, other)]
    assert len({model.fingerprint for model in models}) == 1
    for model in models:
        assert relative(model.logits(PROMPT), logits_of_mlx_lm(folder, one)) < 1e-4


def test_adapters_in_16_bits(tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    adapter = of_mlx_lm(folder, tmp_path / "half", LAYERS)
    file = adapter / "adapters.safetensors"
    mx.save_safetensors(str(file), {name: w.astype(mx.bfloat16) for name, w in mx.load(str(file)).items()})
    for backend in BACKENDS:
        assert relative(load(folder, backend, adapter).logits(PROMPT), logits_of_mlx_lm(folder, adapter)) < 1e-4


def quantised(family: str, place: Path, mode: str) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"moe_intermediate_size": 64} if family == "qwen3_moe" else {}
    folder = tiny_folder(family, **sizes)
    module, config = quantize_model(*load_model(folder), 32, 4, mode=mode)
    shutil.copytree(folder, place)
    weights = dict(tree_flatten(module.parameters()))
    mx.save_safetensors(str(place / "model.safetensors"), weights, metadata={"format": "mlx"})
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize(
    ("family", "kind", "mode"),
    [
        ("llama", "lora", "affine"),
        ("llama", "lora", "mxfp4"),
        ("qwen2", "dora", "affine"),
        ("qwen3_moe", "lora", "affine"),
    ],
)
def test_quantised_weights_stay_packed(family: str, kind: str, mode: str, tmp_path: Path) -> None:
    folder = quantised(family, tmp_path / "packed", mode)
    keys = ALL[family] if mode == "affine" else LAYERS  # mlx-lm rounds embeddings in other modes to bfloat16
    adapter = of_mlx_lm(folder, tmp_path / "mine", keys, kind)
    model: Any = load(folder, "mlx", adapter)
    assert relative(model.logits(PROMPT), logits_of_mlx_lm(folder, adapter)) < 1e-4
    assert "scales" in model.blocks[-1].self_attn.q_proj
    jacobians = mlx_lqr.linearize(model, [PROMPT])
    unpack(model)
    assert relative(model.logits(PROMPT), logits_of_mlx_lm(folder, adapter)) < 1e-4
    for packed, dense in zip(jacobians, mlx_lqr.linearize(model, [PROMPT]), strict=True):
        assert relative(packed, dense) < 1e-4


def test_a_packed_layer_that_the_adapter_has_whole(tmp_path: Path) -> None:
    folder = quantised("qwen2", tmp_path / "packed", "affine")
    random = np.random.default_rng(0)
    weights = {"weight": random.normal(size=(64, 64)), "bias": random.normal(size=64)}
    place = "model.layers.1.self_attn.q_proj"
    whole = {f"{place}.{part}": values.astype(np.float32) for part, values in weights.items()}
    module, _ = load_model(folder)
    module.set_dtype(mx.float32)
    linear = nn.Linear(64, 64)
    linear.weight, linear.bias = (mx.array(whole[f"{place}.{part}"]) for part in ("weight", "bias"))
    module.layers[1].self_attn.q_proj = linear
    expected = np.array(module(mx.array([PROMPT]))[0, -1])
    for order in (1, -1):
        adapter = written(tmp_path / "whole", {"fine_tune_type": "full"}, dict(list(whole.items())[::order]))
        assert relative(load(folder, "mlx", adapter).logits(PROMPT), expected) < 1e-4


def unpack(model: Any) -> None:
    """Give the model dense weights that are W + up down; experts stay as they are."""
    leaves = tree_flatten(model.module.leaf_modules(), is_leaf=nn.Module.is_module)
    dense = []
    for path, leaf in leaves:
        if "scales" in leaf and isinstance(leaf, nn.QuantizedLinear):
            linear = nn.Linear(1, 1, bias="bias" in leaf)
            linear.weight, linear.bias = dequantized(leaf, leaf), leaf.get("bias")
            dense.append((path, linear))
    model.module.update_modules(tree_unflatten(dense))


def edited(adapter: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    return adapter


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tiny_folder("llama")
    return folder, of_mlx_lm(folder, tmp_path_factory.mktemp("adapters") / "songs", LAYERS)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"fine_tune_type": "ia3"}, "fine_tune_type 'ia3'"),
        ({"lora_parameters": {"rank": 4, "scale": 1.0, "gate": 2}}, "says gate 2"),
        ({"lora_parameters": {"rank": 4, "alpha": 1.0}}, "says scale None"),
        ({"lora_parameters": {"rank": 8, "scale": 1.0}}, "not of rank 8"),
        ({"lora_parameters": None}, "no lora_parameters"),
        ({"fine_tune_type": "dora"}, "lacks m for"),
    ],
)
def test_settings_of_mlx_lm_that_are_not_known(
    setting: dict[str, Any], reason: str, llama: Made, tmp_path: Path
) -> None:
    folder, adapter = llama
    wrong = edited(shutil.copytree(adapter, tmp_path / "wrong"), lambda config: config.update(setting))
    with pytest.raises(InputError, match=reason) as caught:
        load(folder, "mlx", wrong)
    assert "\n" not in str(caught.value)
    assert "the adapter wrong" in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"peft_type": "IA3"}, "type IA3"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"something_new": 1}, "something_new"),
        ({"target_parameters": ["mlp.router"]}, "target_parameters"),
        ({"r": 2}, "not of rank 2"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"rank_pattern": {"q_proj(": 4}}, "pattern 'q_proj\\('"),
        ({"use_dora": True}, "no magnitudes"),
        ({"bias": "some"}, "bias 'some'"),
    ],
)
def test_settings_of_peft_that_are_not_known(setting: dict[str, Any], reason: str, llama: Made, tmp_path: Path) -> None:
    folder, adapter = llama
    wrong = edited(in_pefts_format(adapter, tmp_path / "wrong"), lambda config: config.update(setting))
    with pytest.raises(InputError, match=reason) as caught:
        load(folder, "mlx", wrong)
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_adapters(llama: Made, tmp_path: Path) -> None:
    folder, adapter = llama

    def refused(wrong: Path, reason: str) -> None:
        with pytest.raises(InputError, match=reason) as caught:
            load(folder, "mlx", wrong)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", "there is no folder")
    refused(adapter / "adapter_config.json", "is a file")
    refused(folder, "has no adapter_config.json")
    wrong = shutil.copytree(adapter, tmp_path / "wrong")
    (wrong / "adapters.safetensors").write_bytes(b"none")
    refused(wrong, "damaged")
    (wrong / "adapters.safetensors").unlink()
    refused(wrong, "has no adapters.safetensors")
    (wrong / "adapter_config.json").write_text('{"rank": 4}')
    refused(wrong, "of no format that is known")
    (wrong / "adapter_config.json").write_text("{")
    refused(wrong, "not valid JSON")
    pickled = written(tmp_path / "pickled", {"peft_type": "LORA", "r": 4, "lora_alpha": 8}, {}, peft=True)
    refused(pickled, "is empty")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(pickled, "which is never read")
    values = load_file(adapter / "adapters.safetensors")
    name = min(values)
    config = json.loads((adapter / "adapter_config.json").read_text())
    refused(written(tmp_path / "nan", config, values | {name: values[name] * np.nan}), "not finite")
    refused(written(tmp_path / "part", config, {key: values[key] for key in values if key != name}), "lacks lora_a")
    refused(written(tmp_path / "other", config, values | {"model.norm.weight": np.ones(32, np.float32)}), "no part of")


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_of_other_models(backend: str, llama: Made, tmp_path: Path) -> None:
    _, adapter = llama
    with pytest.raises(InputError, match=r"is for a .* of shape .* but this model's is .*\(a/tiny-model\)"):
        load(tiny_folder("llama", hidden_size=48), backend, adapter)
    with pytest.raises(InputError, match=r"changes model\.layers\.2.* which this model has not"):
        load(tiny_folder("llama", num_hidden_layers=2), backend, adapter)
    with pytest.raises(InputError, match="which this model has not"):
        load(tiny_folder("phi3"), backend, adapter)


@pytest.mark.parametrize("backend", BACKENDS)
def test_peft_adapts_embeddings_and_head_apart(backend: str, tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    place, config = "base_model.model", {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    ones = np.ones((64, 32), np.float32)
    matrices = {"lora_embedding_A": ones[:, :1].T.copy(), "lora_embedding_B": ones[:1].T.copy()}
    weights = {f"{place}.model.embed_tokens.{part}": values for part, values in matrices.items()}
    with pytest.raises(InputError, match="changes embed_tokens, which in this model is the head too"):
        load(folder, backend, written(tmp_path / "embeddings", config, weights, peft=True))
    config |= {"modules_to_save": ["embed_tokens", "lm_head"]}
    weights = {f"{place}.lm_head.weight": ones}
    with pytest.raises(InputError, match="changes lm_head, which in this model is the embeddings too"):
        load(folder, backend, written(tmp_path / "head", config, weights, peft=True))
    both = written(tmp_path / "both", config, weights | {f"{place}.model.embed_tokens.weight": ones}, peft=True)
    assert np.ptp(load(folder, backend, both).logits(PROMPT)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_controller_belongs_to_the_model_with_its_adapter(backend: str, llama: Made, tmp_path: Path) -> None:
    folder, adapter = llama
    plain, adapted = load(folder, backend), load(folder, backend, adapter)
    assert plain.fingerprint != adapted.fingerprint == load(folder, backend, adapter).fingerprint
    prompts = np.random.default_rng(0).integers(1, 64, (8, 6)).tolist()
    for fitted, other in ((plain, adapted), (adapted, plain)):
        controller = mlx_lqr.fit(fitted, prompts[:4], prompts[4:], layers=[1], cost="feature")
        assert mlx_lqr.generate(fitted, PROMPT, controller=controller, max_tokens=2, temperature=0) is not None
        with pytest.raises(InputError, match=r"\+ adapter songs"):
            mlx_lqr.generate(other, PROMPT, controller=controller, max_tokens=2)


@pytest.mark.parametrize(("family", "kind"), [("llama", "lora"), ("llama", "dora"), ("qwen3_moe", "lora")])
def test_a_model_that_mlx_lm_has_loaded_with_an_adapter_is_known(family: str, kind: str, tmp_path: Path) -> None:
    folder = tiny_folder(family)
    adapter = of_mlx_lm(folder, tmp_path / "mine", ALL[family], kind)
    module = load_adapters(load_model(folder)[0], str(adapter))
    adopted, loaded = adopt(module), load(folder, "mlx", adapter)
    assert adopted.fingerprint == loaded.fingerprint != adopt(load_model(folder)[0]).fingerprint
    prompts = np.random.default_rng(0).integers(1, 64, (8, 6)).tolist()
    controller = mlx_lqr.fit(loaded, prompts[:4], prompts[4:], layers=[1], cost="feature")
    with mlx_lqr.steer(module, controller, strength=2.0):
        steered = np.array(module(mx.array([PROMPT]), cache=make_prompt_cache(module))[0, -1])
    assert relative(loaded.logits(PROMPT, law=law_on(loaded, controller, 2.0)), steered) < 1e-4


def test_models_without_an_adapter_keep_their_fingerprint(smollm2: Model) -> None:
    assert smollm2.fingerprint == "391fb655dc8b2d80"


@pytest.mark.parametrize("backend", BACKENDS)
def test_smollm2_with_an_adapter(backend: str, smollm2_folder: Path, tmp_path: Path) -> None:
    adapter = of_mlx_lm(smollm2_folder, tmp_path / "mine", ["self_attn.q_proj", "mlp.down_proj"], num_layers=4)
    model = load(smollm2_folder, backend, adapter)
    assert relative(model.logits(PROMPT), logits_of_mlx_lm(smollm2_folder, adapter)) < 1e-4
    options = ["--backend", backend, "--adapter", adapter, "-n", "4", "--temperature", "0"]
    chat = run("chat", smollm2_folder, *options, text="Hello!\n")
    message = model.tokenizer.chat([{"role": "user", "content": "Hello!"}])
    assert mlx_lqr.generate(model, message, max_tokens=4, temperature=0) in chat.stdout


def test_commands_with_an_adapter(llama: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, adapter = llama
    files = [tmp_path / "positive.txt", tmp_path / "negative.txt"]
    for number, file in enumerate(files):
        file.write_text("".join(f"w{10 * number + n}\n" for n in range(1, 7)))
    output = tmp_path / "c.safetensors"
    prompts = ["--positive", str(files[0]), "--negative", str(files[1]), "--concept", "low", "--layers", "1"]
    with_adapter = ["--adapter", str(adapter)]

    fitted = run("fit", folder, *prompts, "-o", output, *with_adapter)
    assert fitted.exit_code == 0, fitted.output
    assert "+ adapter songs" in run("show", output).stdout
    arguments = [str(folder), "-p", "w1", "-c", f"{output}:2", "-n", "4", "--temperature", "0"]
    answer = run("generate", *arguments, *with_adapter)
    assert answer.exit_code == 0
    assert "+ adapter songs" in refused("generate", *arguments)
    assert run_light([*arguments, *with_adapter]) == 0
    assert capsys.readouterr().out == answer.stdout
    assert run_light(arguments) == 2
    assert "+ adapter songs" in capsys.readouterr().err
    assert "there is no folder" in refused("generate", *arguments, "--adapter", tmp_path / "none")
