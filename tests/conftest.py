"""What many tests share: the real SmolLM2, and small random models of every family."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.backends import BACKENDS, smollm2_on
from helpers.chance import refuse_unseeded
from helpers.command_line import PROMPTS
from helpers.real_models import gemma3_folder, gemma3_gguf, smollm2_folder, smollm2_gguf  # noqa: F401 - fixtures
from safetensors.numpy import load_file

import mlx_lqr
from mlx_lqr.backends.protocol import Model
from mlx_lqr.convert.sources import DEMO_NAME

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # MLX compiles kernels for the CPU into a folder of this one, and reads what another process has half written.
    own = Path(tempfile.gettempdir()) / f"mlx-lqr-tests-{worker}"
    own.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = str(own)

GOLDEN = Path(__file__).parent / "golden"
HAVE_MLX = importlib.util.find_spec("mlx") is not None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Where MLX is not installed (on Windows, say), skip the files of tests that need it."""
    report = yield
    needed = re.search(r"(No module named '|import of )mlx(_lm)?\b", str(report.longrepr))
    if report.failed and needed and not HAVE_MLX:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, "Skipped: MLX is not installed here")
    return report


@pytest.fixture(scope="session", autouse=True)
def _demo_is_loaded_once() -> Iterator[None]:
    """Commands and tests that load the demonstration model as it is get one and the same on each backend."""
    with pytest.MonkeyPatch.context() as patch:
        for name in BACKENDS if HAVE_MLX else BACKENDS[1:]:
            backend = importlib.import_module(f"mlx_lqr.backends.{name}.model")
            patch.setattr(backend, "load", _loading_once(backend.load))
        yield


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_to_chance() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        refuse_unseeded(patch)
        yield


def _loading_once(load: Callable[..., Model]) -> Callable[..., Model]:
    kept: dict[object, Model] = {}

    @functools.wraps(load)
    def once(folder: Path, name: str, *options: object) -> Model:
        if name != DEMO_NAME:
            return load(folder, name, *options)
        key = (folder.resolve(), *(None if option == "float32" else option for option in options))
        if key not in kept:
            kept[key] = load(folder, name, *options)
        return kept[key]

    return once


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """SmolLM2-135M-Instruct on MLX, converted from its GGUF by this library, float32."""
    return smollm2_on("mlx")


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Numbers of an independent PyTorch implementation (see the README beside them): arrays and the JSON's entries."""
    return {
        **load_file(GOLDEN / "smollm2_ocean.safetensors"),
        **json.loads((GOLDEN / "smollm2_ocean.json").read_text("utf-8")),
    }


@pytest.fixture(scope="session")
def ocean(smollm2: Model, golden: dict[str, Any]) -> mlx_lqr.Contrast:
    return mlx_lqr.contrast(smollm2, golden["positive"], golden["negative"])


@pytest.fixture(scope="session")
def jacobians(smollm2: Model, golden: dict[str, Any]) -> mlx_lqr.Jacobians:
    return mlx_lqr.linearize(smollm2, golden["jacobian_prompts"])


@pytest.fixture(scope="session")
def controller(jacobians: mlx_lqr.Jacobians, ocean: mlx_lqr.Contrast) -> mlx_lqr.Controller:
    return mlx_lqr.compile(mlx_lqr.solve(jacobians, 0.1, 1.0, 0.1), ocean, "ocean", setpoint="paper", feedback=1.0)


@pytest.fixture(scope="session")
def dog(tmp_path_factory: pytest.TempPathFactory, smollm2: Model) -> Path:
    """The file of a controller that is quickly made."""
    positive, negative = mlx_lqr.bundled_prompts("dog")
    controller = mlx_lqr.fit(
        smollm2, positive[:6], negative[:6], concept="dog", q=1.0, qf=1.0, layers=range(20, 30), cost="feature"
    )
    file = tmp_path_factory.mktemp("dog") / "dog.safetensors"
    controller.save(file)
    return file


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    """PROMPTS of helpers/command_line.py, as JSON lines."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return file
