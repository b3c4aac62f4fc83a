"""Control vectors out: additive methods exactly, A-LQR by its mean push, and what that leaves is measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.backends import smollm2_on, tiny_on
from helpers.command_line import refused, run

import mlx_lqr
from mlx_lqr import METHODS, Controller, InputError
from mlx_lqr.lqr.prompts import tokenise
from mlx_lqr.methods import law_of
from mlx_lqr.methods.control_vector import as_steering
from mlx_lqr.sharing import open_loop as module
from mlx_lqr.sharing.open_loop import constant_push, open_loop
from mlx_lqr.tasks.read import bundled_lines

SETS = [[1, 2, 3], [4, 5, 6], [7, 9]], [[9, 8, 7], [6, 5], [11, 12]]


def additive(method: str, **how: Any) -> tuple[Any, Any]:
    model = tiny_on("mlx", "llama")
    return model, mlx_lqr.fit_baseline(model, method, *SETS, concept="one", **how)


@pytest.mark.parametrize("method", ["actadd", "mean-act", "pid-act", "pca"])
def test_additive_methods_are_exported_exactly(method: str, tmp_path: Path) -> None:
    """The written file does what the method does at that strength, at layers that the format has."""
    model, fitted = additive(method, layers=[1], positions="all")
    fitted.save(tmp_path / "one.safetensors")
    result = run(
        *(
            "export",
            tmp_path / "one.safetensors",
            "--control-vector",
            tmp_path / "one.gguf",
            "--strength",
            "1.5",
            "--json",
        )
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["exact"], said["layers"], said["strength"]) == (True, [1], {"one": 1.5})
    vector = mlx_lqr.load_steering(tmp_path / "one.gguf")
    vector.check_model(model)
    prompt = [3, 1, 4, 1, 5]
    theirs = model.logits(prompt, law=law_of(vector), steer_all=True)
    ours = model.logits(prompt, law=law_of(fitted, 1.5), steer_all=True)
    assert np.array_equal(theirs, ours)
    assert not np.allclose(ours, model.logits(prompt))


def test_a_push_at_layer_0_has_no_place(tmp_path: Path) -> None:
    _, everywhere = additive("actadd", layers=[0, 1])
    opened = open_loop(everywhere, [1.0])
    assert list(opened.vectors.directions) == [1]
    assert opened.left_out == pytest.approx(np.linalg.norm(everywhere.tensors["shift"][0]))
    assert not opened.everywhere
    _, first = additive("actadd", layers=[0])
    with pytest.raises(InputError, match="nothing is added after block 0"):
        open_loop(first, [1.0])
    everywhere.save(tmp_path / "one.safetensors")
    result = run("export", tmp_path / "one.safetensors", "--control-vector", tmp_path / "one.gguf")
    assert "Note: the push at layer 0" in result.stderr
    assert "Note: this steers from the prompt's last token on" in result.stderr


@pytest.mark.parametrize("method", [name for name in METHODS if name != "alqr"])
def test_every_method_is_exact_or_says_why_not(method: str) -> None:
    _, fitted = additive(method)
    if method in ("actadd", "mean-act", "pid-act", "pca"):
        assert np.allclose(constant_push(fitted, [2.0]), 2 * fitted.tensors["shift"][..., 0])
        return
    with pytest.raises(InputError, match=rf"{method} makes .* of a block's output y, which no vector does") as refusal:
        open_loop(fitted, [1.0])
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def controller() -> Controller:
    positive, negative = mlx_lqr.bundled_prompts("ocean")
    return mlx_lqr.fit(smollm2_on("mlx"), positive[:12], negative[:12], concept="ocean", layers=[27, 28, 29])


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fewer and shorter sentences than the export takes."""
    lines = bundled_lines("neutral.txt")[:6]
    monkeypatch.setattr(module, "LENGTH", 3)
    monkeypatch.setattr(module, "bundled_lines", lambda _: lines)
    return lines


def prefixes(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(text[:end]) for text in texts for end in range(module.START, len(text) + 1)]


def test_the_mean_push_is_that_of_the_closed_loop(controller: Controller, short: list[str]) -> None:
    """By residual streams at every prefix and the law's formula; the export decodes and records."""
    model = smollm2_on("mlx")
    whole = replace(controller, positions="all")
    opened = open_loop(whole, [2.0], model)
    texts = [tokenise(model, line)[: module.START + 3] for line in short[::2]]
    states = model.residuals(prefixes(texts), law=law_of(whole, 2.0), steer_all=True)
    for k in range(1, whole.num_layers):
        error = whole.offset[k] + 2.0 * whole.setpoint[k] - states[:, k] @ whole.sensor[k]
        push = (error @ whole.gain[k].T).mean(axis=0)
        assert (k in opened.vectors.directions) == (k in whole.active_layers)
        if k in opened.vectors.directions:
            assert np.allclose(opened.vectors.directions[k], push, atol=1e-3 * np.abs(push).max())
    assert opened.vectors.model_hint == "llama"
    assert opened.vectors.fingerprint == model.fingerprint


def test_what_is_left_is_all_without_feedback_and_a_half_of_half_the_push(
    controller: Controller, short: list[str]
) -> None:
    """A controller that reads nothing pushes all texts alike: its vector leaves all of it."""
    model = smollm2_on("mlx")
    blind = replace(controller, readout=np.zeros_like(controller.direction), positions="all")
    small = replace(blind, setpoint=blind.setpoint * 0.1, offset=blind.offset * 0)
    opened = open_loop(small, [1.0], model)
    assert opened.left is not None
    assert opened.left.share == pytest.approx(1.0, abs=0.02)
    assert opened.left.closed == pytest.approx(opened.left.vector, rel=0.02)
    halved = {k: 0.5 * direction for k, direction in opened.vectors.directions.items()}
    half = module._left(model, small, [1.0], replace(opened.vectors, directions=halved), None)
    assert half.share == pytest.approx(0.5, abs=0.05)
    assert half.closed == pytest.approx(opened.left.closed)
    seeing = open_loop(controller, [2.0], model)
    assert seeing.left is not None
    assert 0 < seeing.left.share < 0.99
    assert seeing.left.sentences == 3


def test_the_vector_carries_on_where_the_controller_would(controller: Controller, short: list[str]) -> None:
    """Read back, it is steering of the same concept on the same model, and makes its words likelier."""
    model = smollm2_on("mlx")
    vector = as_steering(open_loop(controller, [2.5], model).vectors)
    assert vector.concepts == controller.concepts
    said = [(tokenise(model, "They looked at the"), tokenise(model, text)) for text in (" ocean", " sea", " waves")]
    plain = np.concatenate(model.log_probabilities(said))
    assert np.all(np.concatenate(model.log_probabilities(said, law=law_of(vector), steer_all=True)) > plain + 1)


def test_mistakes_are_one_line(tmp_path: Path, controller: Controller) -> None:
    file, out = tmp_path / "ocean.safetensors", tmp_path / "out.gguf"
    controller.save(file)
    assert "name the MODEL too, mlx-lqr export FILE MODEL" in refused("export", file, "--control-vector", out)
    assert "strength 0 is not steered" in refused("export", file, "--control-vector", out, "--strength", "0")
    assert "strength must be a number" in refused("export", file, "--control-vector", out, "--strength", "much")
    assert "there is no file" in refused("export", tmp_path / "no.safetensors", "--control-vector", out)
    out.write_text("something of mine")
    assert "is not a control vector" in refused("export", file, "--control-vector", out)
    assert out.read_text() == "something of mine"
    with pytest.raises(InputError, match="this controller was fitted on"):
        open_loop(controller, [1.0], tiny_on("mlx", "llama"))
    with pytest.raises(InputError, match="not finite at this strength"):
        open_loop(additive("actadd", layers=[1])[1], [1e39])
