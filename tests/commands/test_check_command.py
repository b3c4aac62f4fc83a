"""mlx-lqr check: what it says of a model is so, and a wrong derivative is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.backends import BACKENDS, tiny_folder, tiny_on
from helpers.command_line import refused, run

from mlx_lqr.analysis.check import check

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def checked(*arguments: object) -> dict[str, Any]:
    result = run("check", *arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@every_backend
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_says_what_the_model_is(backend: str, family: str) -> None:
    folder = tiny_folder(family)
    found = checked(folder, "--backend", backend)
    config = json.loads((folder / "config.json").read_text())
    assert found["num_layers"] == config["num_hidden_layers"]
    assert found["hidden_size"] == config["hidden_size"]
    assert found["vocab_size"] == config["vocab_size"]
    described = found["description"]
    assert described["context_length"] == config["max_position_embeddings"]
    assert described["dtype"] == "float32"
    assert described["packing"] == ""
    assert described["nbytes"] == 4 * described["parameters"]
    assert found["has_chat_template"] is False
    assert all(seconds > 0 for seconds in found["speed"].values())


@every_backend
def test_measures_the_derivatives_that_are_used(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 % in one entry of a Jacobian are seen."""
    model = tiny_on(backend, "llama")
    right = model.measure()
    assert right.is_exact
    assert right.jacobian < 2e-3
    own = model.jacobian
    monkeypatch.setattr(model, "jacobian", lambda trace, layer: own(trace, layer) * np.float32(1.05))
    wrong = model.measure()
    assert wrong.jacobian == pytest.approx(0.05, rel=0.1)
    assert not wrong.is_exact


@every_backend
def test_counts_what_is_shared_once(backend: str) -> None:
    """Of a model whose head is its embedding."""
    tied, own = (
        tiny_on(backend, "llama", tie_word_embeddings=True),
        tiny_on(backend, "llama", tie_word_embeddings=False),
    )
    head = tied.vocab_size * tied.hidden_size
    assert own.description.parameters - tied.description.parameters == head


@pytest.mark.parametrize(("bits", "mode"), [(4, "affine"), (8, "affine"), (4, "mxfp4")])
def test_counts_packed_weights_as_mlx_lm_does(bits: int, mode: str) -> None:
    import mlx.nn as nn
    from helpers.tiny import tiny
    from mlx_lm.utils import get_total_parameters

    model = tiny("llama")
    plain = model.description
    nn.quantize(model.module, group_size=32, bits=bits, mode=mode)
    packed = model.description
    assert packed.parameters == plain.parameters == get_total_parameters(model.module)
    assert packed.packing == (f"{bits} bits" if mode == "affine" else mode)
    assert packed.nbytes < plain.nbytes / 2


def test_prints_a_line_for_everything() -> None:
    result = run("check", tiny_folder("qwen3"))
    assert result.exit_code == 0, result.output
    labels = [line[:10].strip() for line in result.stdout.splitlines()]
    assert [label for label in labels if label] == [
        "model", "size", "computes", "words", "context", "steering", "speed", "fitting",
    ]  # fmt: skip


def test_a_model_that_cannot_be_steered_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody_knows_it"}))
    assert "nobody_knows_it" in refused("check", tmp_path)
    assert "no such" in refused("check", tmp_path / "nowhere").lower() or "hub" in refused(
        "check", tmp_path / "nowhere"
    )


def test_a_backend_without_derivatives_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_on("mlx", "llama")

    class Engine:
        """`Runner`, and no more."""

        def __getattr__(self, name: str) -> Any:
            if name in ("measure", "jacobian", "vjp", "jvp", "block", "trace"):
                raise AttributeError(name)
            return getattr(model, name)

    found = check(Engine())  # type: ignore[arg-type]
    assert found.measurement is None
    assert found.speed.state_cost is found.speed.feature_cost is None
    assert found.speed.writing > 0
