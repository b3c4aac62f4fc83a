"""Models that several processes share: every number is that of one process, and who may not speak is silent."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.nn as nn
import numpy as np
import pytest
from helpers import spread
from helpers.architectures import folder_of
from helpers.backends import tiny_folder
from helpers.command_line import refused, run
from helpers.launching import launched
from helpers.platforms import posix
from helpers.tiny import tiny

import mlx_lqr
from mlx_lqr import InputError

pytestmark = posix
COMMAND = [sys.executable, "-m", "mlx_lqr"]
IN_THREE = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 48}
TWO_LAYERS = {"num_hidden_layers": 2}
SPREAD: dict[int, list[tuple[str, dict[str, int], str]]] = {
    2: [("llama", TWO_LAYERS, ""), ("qwen2", TWO_LAYERS, "pipeline"), ("qwen3_5", {}, "pipeline")],
    3: [("llama", TWO_LAYERS | IN_THREE, ""), ("ministral3", {"num_hidden_layers": 3}, "pipeline")],
}
"""Families, with changes of their configs, and how each is spread over so many processes."""
LISTED = ("llama", "qwen2")
EXACT, BY_DIFFERENCES = 1e-4, 1e-2
"""Relative errors of numbers in float32; jvp is by differences where weights are split."""


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """So that nothing measured by another version counts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_LQR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def folder(family: str, changes: dict[str, int], place: Path) -> Path:
    if family in LISTED:
        return tiny_folder(family, **changes)
    (own := place / family).mkdir()
    return folder_of(family, own, **changes)


@pytest.mark.parametrize("count", SPREAD)
def test_every_number_is_that_of_one_process(count: int, tmp_path: Path) -> None:
    """Residual streams, Jacobians and products with them, gains, answers, and the fingerprint by which a controller
    knows its model."""
    folders = [folder(family, changes, tmp_path) for family, changes, _ in SPREAD[count]]
    kinds = [kind for _, _, kind in SPREAD[count]]
    out = tmp_path / "numbers.npz"
    sources = [f"{place}:{kind}" for place, kind in zip(folders, kinds, strict=True)]
    done = launched(count, [sys.executable, spread.__file__, out, *sources])
    assert out.is_file(), done.stderr
    together = np.load(out)
    for number, (place, kind) in enumerate(zip(folders, kinds, strict=True)):
        model = mlx_lqr.load(place, backend="mlx")
        for name, alone in spread.numbers(model, str(number), brief=count > 2).items():
            if alone.dtype.kind == "i":
                assert together[name].tolist() == alone.tolist(), name
                continue
            allowed = EXACT if kind or not name.endswith("jvp") else BY_DIFFERENCES
            error = np.linalg.norm(together[name] - alone) / np.linalg.norm(alone)
            assert error < allowed, (SPREAD[count][number], name, error)


def conversing(place: Path) -> Path:
    """Give a folder a chat template."""
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (place / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return place


def test_commands_speak_and_write_once(tmp_path: Path) -> None:
    """A controller that two processes have fitted works in one, with the same answers; so does a conversation."""
    place = conversing(tiny_folder("llama", **TWO_LAYERS))
    for name, words in (("positive", "w1\nw4\n"), ("negative", "w6\nw8\n")):
        (tmp_path / name).write_text(words)
    prompts = [
        "--positive",
        tmp_path / "positive",
        "--negative",
        tmp_path / "negative",
        "--layers",
        "all",
        "--plain-prompts",
    ]
    together, alone = tmp_path / "together.safetensors", tmp_path / "alone.safetensors"
    fitted = launched(2, [*COMMAND, "fit", place, *prompts, "-o", together])
    assert fitted.stdout.count("Wrote") == 1, fitted.stderr
    assert run("fit", place, *prompts, "-o", alone).exit_code == 0
    controllers = [mlx_lqr.Controller.load(file) for file in (together, alone)]
    np.testing.assert_allclose(controllers[0].gain, controllers[1].gain, rtol=1e-3, atol=1e-5)
    talk = ["chat", place, "-c", f"{together}:2", "-n", "5", "--temperature", "0"]
    conversation = launched(2, [*COMMAND, *talk, "--pipeline"], "w5\n/strength 0\nw9\n/quit\n")
    assert conversation.stdout == run(*talk, text="w5\n/strength 0\nw9\n").stdout, conversation.stderr
    assert conversation.stderr.count("Not steered") == 1


def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    place = tiny_folder("llama", **IN_THREE)
    done = launched(2, [*COMMAND, "generate", place, "-p", "w5"])
    assert not done.stdout
    assert [line for line in done.stderr.splitlines() if "rank" not in line] == [
        "Error: this model cannot be split into 2 parts, for 2 does not divide its n_kv_heads 3: use another number of "
        "them, or --pipeline"
    ]


def test_what_mlx_lm_has_split_has_no_jacobian_here() -> None:
    """A group of one will do: the layers are those of several."""
    model = tiny("llama")
    projection = model.blocks[0].self_attn.q_proj
    model.blocks[0].self_attn.q_proj = nn.layers.distributed.shard_linear(projection, "all-to-sharded")
    assert model.residuals([spread.PROMPT]).any()
    with pytest.raises(InputError, match=r"load it with mlx_lqr\.load"):
        model.trace(spread.PROMPT)


def test_one_process_is_no_pipeline() -> None:
    place = tiny_folder("llama")
    assert "needs several machines" in refused("generate", place, "-p", "w5", "--backend", "mlx", "--pipeline")


def test_what_is_for_one_process_is_refused_in_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text('[["127.0.0.1:1"], ["127.0.0.1:2"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setattr("mlx.core.distributed.init", lambda **_: pytest.fail("waits for others"))
    place, out = tiny_folder("llama"), tmp_path / "out"
    for arguments in (["demo"], ["convert", place, out], ["linearize", place, "-o", out]):
        assert "without mlx.launch" in refused(*arguments)
    assert "PyTorch runs a model in one process" in refused("generate", place, "-p", "w5", "--backend", "torch")
    assert "with -p TEXT" in refused("generate", place, text="w5")
    hosts.write_text("\n")  # as for one process
    assert run("generate", place, "-p", "w5", "-n", "1", "--seed", "1", "--backend", "mlx").exit_code == 0
