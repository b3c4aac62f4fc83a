"""A Hugging Face checkpoint becomes an MLX folder with the same logits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import torch
from helpers.tiny_gguf import CONTROL, VOCABULARY, logits, reference_model, write
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]
from mlx_lm.utils import load_model
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from mlx_lqr.convert import convert
from mlx_lqr.errors import InputError

PROMPT = np.random.default_rng(3).integers(0, VOCABULARY, 40).tolist()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer files (a GGUF conversion's)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return convert(write(folder / "t.gguf", "llama").path, folder / "model")


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A tiny Llama in bfloat16, as `save_pretrained` writes it, with a tokenizer."""
    folder = tmp_path / "checkpoint"
    reference_model("llama").bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tokenizer_folder / name, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


def change_config(folder: Path, file: str = "config.json", **changes: Any) -> None:
    config = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def mlx_logits(folder: Path) -> np.ndarray:
    model, _ = mlx_lm.load(str(folder))
    return np.array(model(mx.array([PROMPT]))[0].astype(mx.float32))


def rounded(dtype: torch.dtype) -> Any:
    """The reference with its weights rounded as the checkpoint's and the conversion's are."""
    model = reference_model("llama")
    for parameter in model.parameters():  # not its buffers: RoPE's frequencies stay as they are
        parameter.data = parameter.data.bfloat16().to(dtype).float()
    return model


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("float32", torch.float32), ("float16", torch.float16)])
def test_logits_equal_torch(dtype: str, torch_dtype: torch.dtype, checkpoint: Path, tmp_path: Path) -> None:
    folder = convert(checkpoint, tmp_path / "out", dtype=dtype)
    assert {str(weight.dtype) for weight in load_file(folder / "model.safetensors").values()} == {dtype}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype
    tolerance = 1e-3 if dtype == "float32" else 0.05
    np.testing.assert_allclose(mlx_logits(folder), logits(rounded(torch_dtype), PROMPT), atol=tolerance)


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma3", {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    ],
)
def test_settings_that_transformers_5_nests_are_read(
    arch: str, changes: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    model = reference_model(arch, **changes)
    model.save_pretrained(checkpoint)
    assert "rope_theta" not in json.loads((checkpoint / "config.json").read_text())  # it is in rope_parameters
    folder = convert(checkpoint, tmp_path / "out")
    np.testing.assert_allclose(mlx_logits(folder), logits(model, PROMPT), atol=1e-3)


def test_weights_keep_the_checkpoints_dtype_and_values(checkpoint: Path, tmp_path: Path) -> None:
    folder = convert(checkpoint, tmp_path / "out")
    ours = mx.load(str(folder / "model.safetensors"))
    theirs = reference_model("llama").bfloat16().state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.dtype == mx.bfloat16
        np.testing.assert_array_equal(np.array(weight.astype(mx.float32)), theirs[name].float().numpy())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_logits_are_those_of_the_dequantised_weights(bits: int, checkpoint: Path, tmp_path: Path) -> None:
    folder = convert(checkpoint, tmp_path / "out", dtype="float32", quantize=bits, group_size=32)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"} == config["quantization_config"]
    model, _ = load_model(folder)
    reference = rounded(torch.float32)
    changed = 0
    for name, module in model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            weight = mx.dequantize(module.weight, module.scales, module.biases, 32, bits)
            reference.get_submodule(name).weight.data = torch.from_numpy(np.array(weight))
            changed += 1
    assert changed == 2 * 7 + 2
    np.testing.assert_allclose(mlx_logits(folder), logits(reference, PROMPT), atol=1e-3)


def test_tokenizer_files_come_along(checkpoint: Path, tmp_path: Path) -> None:
    change_config(checkpoint, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    (checkpoint / "evil.py").write_text("raise SystemExit('ran')")
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    folder = convert(checkpoint, tmp_path / "out")
    assert sorted(file.name for file in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "auto_map" not in (folder / "tokenizer_config.json").read_text()
    _, tokenizer = mlx_lm.load(str(folder))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    assert tokenizer.encode("hello") == Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode("hello").ids


def test_tokenizer_json_is_built_from_older_files(checkpoint: Path, tmp_path: Path) -> None:
    model = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "vocab.json").write_text(json.dumps(model["vocab"]))
    (checkpoint / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    change_config(checkpoint, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    folder = convert(checkpoint, tmp_path / "out")
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("hello world").ids
    assert [index for index in ids if index >= len(CONTROL)] == [VOCABULARY - 6, VOCABULARY - 1]


def test_native_model_with_an_auto_map_is_fine_and_its_code_is_left_behind(checkpoint: Path, tmp_path: Path) -> None:
    change_config(checkpoint, auto_map={"AutoModelForCausalLM": "evil.Model"})
    folder = convert(checkpoint, tmp_path / "out")
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_sharded_checkpoint_is_read(checkpoint: Path, tmp_path: Path) -> None:
    reference_model("llama").bfloat16().save_pretrained(checkpoint, max_shard_size="100KB")
    (checkpoint / "model.safetensors").unlink(missing_ok=True)
    assert (checkpoint / "model.safetensors.index.json").exists()
    folder = convert(checkpoint, tmp_path / "out", dtype="float32")
    np.testing.assert_allclose(mlx_logits(folder), logits(rounded(torch.float32), PROMPT), atol=1e-3)


def test_quantised_checkpoint_passes_through_but_is_not_quantised_again(checkpoint: Path, tmp_path: Path) -> None:
    quantised = convert(checkpoint, tmp_path / "quantised", quantize=4)
    again = convert(quantised, tmp_path / "again")
    np.testing.assert_array_equal(mlx_logits(again), mlx_logits(quantised))
    with pytest.raises(InputError, match="already quantised: leave out --quantize"):
        convert(quantised, tmp_path / "twice", quantize=4)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _scramble(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:8] + b"x" * 50 + content[58:])


def _lose_a_weight(folder: Path) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    weights.pop("model.norm.weight")
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def _not_a_number(folder: Path) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.norm.weight"] = mx.full((64,), float("nan"))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _lose_a_shard(folder: Path) -> None:
    reference_model("llama").save_pretrained(folder, max_shard_size="100KB")
    next(folder.glob("model-00002*")).unlink()


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "no type": (lambda f: change_config(f, model_type=None), "states no model_type"),
    "unknown type": (lambda f: change_config(f, model_type="florp"), "'florp', which mlx-lm does not know"),
    "helper module": (lambda f: change_config(f, model_type="cache"), "'cache', which mlx-lm does not know"),
    "path as type": (lambda f: change_config(f, model_type="..os"), "which mlx-lm does not know"),
    "own code": (
        lambda f: change_config(f, model_file="evil.py"),
        "needs its own code .{1,2}evil.py.{1,2}, which is never run",
    ),
    "long heads": (lambda f: change_config(f, head_dim=1 << 32), "says head_dim 4294967296, which no model has"),
    "many layers": (lambda f: change_config(f, num_hidden_layers=22 << 40), "num_hidden_layers .*, which no model has"),
    "missing setting": (lambda f: change_config(f, num_attention_heads=None), "num_attention_heads x head_dim"),
    "other shape": (lambda f: change_config(f, hidden_size=128), "do not fit its config.json: .*hidden_size is 128"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model"),
    "only pickled": (_only_pickle, "only has pickled weights"),
    "truncated": (lambda f: _truncate(f / "model.safetensors"), "cut short or corrupt"),
    "scrambled": (lambda f: _scramble(f / "model.safetensors"), "cut short or corrupt"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "cut short or corrupt"),
    "irregular": (
        lambda f: change_config(f, model_type="gemma3_text", layer_types=["full_attention", "sliding_attention"]),
        "in no regular order",
    ),
    "missing weight": (_lose_a_weight, "does not fit its config.json"),
    "missing shard": (_lose_a_shard, "lacks model-00002"),
    "not a number": (_not_a_number, "model.norm.weight holds values that are not numbers"),
    "no tokenizer": (lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint_is_one_line_and_leaves_nothing(case: str, checkpoint: Path, tmp_path: Path) -> None:
    breaking, message = BROKEN[case]
    breaking(checkpoint)
    place = tmp_path / "place"
    with pytest.raises(InputError, match=message) as caught:
        convert(checkpoint, place / "out")
    assert "\n" not in str(caught.value)
    assert ":" in str(caught.value)  # what is wrong: what to do
    assert list(place.iterdir()) == []


def test_weights_too_large_for_the_dtype_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    weights = mx.load(str(checkpoint / "model.safetensors"))
    weights["model.norm.weight"] = mx.full((64,), 1e6)
    mx.save_safetensors(str(checkpoint / "model.safetensors"), weights)
    with pytest.raises(InputError, match="too large for float16: use bfloat16"):
        convert(checkpoint, tmp_path / "out", dtype="float16")


HUB_FILES = [
    "README.md",
    "config.json",
    "modeling_evil.py",
    "pytorch_model.bin",
    "model.safetensors",
    "consolidated.pth",
    "tokenizer.json",
    "tokenizer.model",
    "model.gguf",
    "onnx/model.onnx",
]


def test_hub_download_takes_no_code_and_no_pickle(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.update(name=name, files=list(filter_repo_objects(HUB_FILES, allow_patterns=allow_patterns)))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = convert("org/model", tmp_path / "out", dtype="float32")
    assert asked == {
        "name": "org/model",
        "files": ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"],
    }
    np.testing.assert_allclose(mlx_logits(folder), logits(rounded(torch.float32), PROMPT), atol=1e-3)


def test_hub_without_a_network_is_one_line(tmp_path: Path) -> None:
    """Against a real, closed port: what huggingface_hub raises then is its own business, and changes."""
    code = f"""
from mlx_lqr.convert import convert
from mlx_lqr.errors import InputError
try:
    convert("org/model", {str(tmp_path / "place" / "out")!r})
except InputError as error:
    print(error)
"""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("cannot download org/model ("), done.stderr
    assert done.stdout.count("\n") == 1
    assert "check the network" in done.stdout
    assert list((tmp_path / "place").iterdir()) == []


def test_model_that_the_hub_does_not_have_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise RepositoryNotFoundError("404\nlong story", response=MagicMock())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=r"the hub has no model org/model .*: check the name"):
        convert("org/model", tmp_path / "out")
