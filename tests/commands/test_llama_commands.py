"""Commands on a GGUF file: which backend runs it, that it is said, and what has to be fitted by another one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers.controllers import controller_for
from helpers.tiny_gguf import write

import mlx_lqr
from mlx_lqr.backends import registry
from mlx_lqr.backends.backend import Suitability
from mlx_lqr.commands import main
from mlx_lqr.loading import able_to_fit, running_backend

pytest.importorskip("llama_cpp")

NOTE = "Note: llama.cpp runs this file (--backend mlx for MLX)"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llama") / "tiny.gguf", "llama", metadata={"general.file_type": 0}).path


@pytest.fixture(scope="module")
def controller(file: Path) -> Path:
    saved = file.with_name("controller.safetensors")
    controller_for(mlx_lqr.load(file)).save(saved)
    return saved


def run(*arguments: Any, status: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert result.exit_code == status, result.output
    return result


def steered(file: Path, controller: Path, *options: Any) -> Result:
    return run("generate", file, "-p", "hello world", "-c", f"{controller}:2", "-n", 8, "--temperature", 0, *options)


@pytest.mark.skipif(sys.platform == "darwin", reason="Metal takes the file there")
def test_a_command_that_only_runs_a_file_takes_llama_and_says_so(file: Path, controller: Path) -> None:
    by_itself, asked, mlx = (
        steered(file, controller, *options) for options in ((), ("--backend", "llama"), ("--backend", "mlx"))
    )
    assert NOTE in by_itself.stderr
    assert NOTE not in asked.stderr
    assert NOTE not in mlx.stderr
    assert by_itself.stdout == asked.stdout == mlx.stdout


@pytest.mark.skipif(sys.platform == "darwin", reason="Metal takes the file there")
def test_what_acts_inside_attention_runs_in_llama_too(file: Path, tmp_path: Path) -> None:
    iti = tmp_path / "iti.safetensors"
    mlx_lqr.fit_baseline(mlx_lqr.load(file), "iti", [[1, 2, 3], [4, 5]], [[6, 7], [8]]).save(iti)
    by_itself = steered(file, iti)
    assert NOTE in by_itself.stderr
    assert by_itself.stdout == steered(file, iti, "--backend", "mlx").stdout


def test_what_llama_cpp_cannot_do_stays_with_mlx(file: Path, controller: Path, tmp_path: Path) -> None:
    assert NOTE not in steered(file, controller, "--dtype", "float32").stderr
    assert NOTE not in steered(file, controller, "--adaptive").stderr
    assert mlx_lqr.load(file).backend == "mlx"
    assert NOTE not in run("fit", file, "--concept", "ocean", "--method", "actadd", "--layers", 1, "--plain-prompts",
                           "-o", tmp_path / "a.safetensors").stderr  # fmt: skip


def test_auto_takes_llama_for_gguf_files_without_a_gpu_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(registry.backend("mlx")), "suitability", lambda _: Suitability.CPU)
    monkeypatch.setattr(type(registry.backend("torch")), "suitability", lambda _: Suitability.CPU)
    assert running_backend(str(file), "auto") == "llama"
    assert running_backend(str(file), "mlx") == "mlx"
    assert running_backend(str(file), "auto", as_it_is=False) == "auto"
    assert running_backend("demo", "auto") == "auto"
    assert running_backend(str(file.parent), "auto") == "auto"
    assert running_backend("missing.gguf", "auto") == "auto"
    other = write(file.with_name("other.gguf"), "llama", metadata={"general.architecture": "mamba"}).path
    assert running_backend(str(other), "auto") == "auto"
    monkeypatch.setattr(type(registry.backend("torch")), "suitability", lambda _: Suitability.GPU)
    assert running_backend(str(file), "auto") == "auto"
    monkeypatch.setattr(type(registry.backend("torch")), "suitability", lambda _: Suitability.NOT_INSTALLED)
    monkeypatch.setattr(type(registry.backend("llama")), "suitability", lambda _: Suitability.NOT_INSTALLED)
    assert running_backend(str(file), "auto") == "auto"


def test_fitting_names_the_way_out(file: Path, controller: Path) -> None:
    refused = run("fit", file, "--backend", "llama", "--concept", "ocean", "-o", "x.safetensors", status=2)
    assert "llama.cpp runs models but cannot fit controllers: load this one with --backend mlx" in refused.stderr
    refused = run("linearity", file, "--backend", "llama", "-c", controller, status=2)
    assert "llama.cpp runs models but cannot measure how linear its blocks are" in refused.stderr
    refused = run("generate", file, "--backend", "llama", "-p", "a", "-c", controller, "--adaptive", status=2)
    assert "llama.cpp runs models but cannot adapt gains to a prompt" in refused.stderr


def test_another_backend_fits_with_the_same_file(file: Path) -> None:
    ours = mlx_lqr.load(file, backend="llama")
    able = able_to_fit(ours)
    assert able.backend == "mlx"
    assert able.fingerprint == ours.fingerprint
    fitted = controller_for(able)
    assert able_to_fit(able) is able
    answers = [
        mlx_lqr.generate(model, [5, 17, 3], controller=fitted, max_tokens=8, temperature=0) for model in (ours, able)
    ]
    assert answers[0] == answers[1]


def test_tracking_and_recordings_are_mlx_own(file: Path, controller: Path) -> None:
    fields = [
        json.loads(steered(file, controller, "--json", "--track", "--backend", backend).stdout)
        for backend in ("llama", "mlx")
    ]
    assert fields[0]["tokens"] == fields[1]["tokens"]
    (ours, expected) = (np.array(one["control"]["push"]) for one in fields)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)
    features = [np.array(next(iter(one["tracking"].values()))["feature"]) for one in fields]
    np.testing.assert_allclose(features[0], features[1], rtol=1e-3, atol=1e-3)
