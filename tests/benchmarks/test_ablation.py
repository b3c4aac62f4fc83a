"""The ablation of A-LQR's recipe: its laws, its levers, and what is read off under them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.backends import tiny_on

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

import mlx_lqr  # noqa: E402
from benchmarks.comparison import ablation  # noqa: E402
from benchmarks.comparison.ablation import LEVERS, AfterBlock, Bench, Capped, OneWay, ablate  # noqa: E402
from mlx_lqr.backends.protocol import Model  # noqa: E402

SETS = [[1, 2, 3], [4, 5], [9, 30, 7]], [[6, 7], [8], [12, 44]]


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(tiny_on("mlx", "llama"), SETS)


def test_the_laws_push_one_way_or_so_hard_or_from_what_the_block_put_out(bench: Bench) -> None:
    controller, _ = bench.fit(layers="all")
    k, z = 1, np.random.default_rng(0).standard_normal((50, controller.hidden_size)).astype(np.float32)
    gain, sensor = controller.gain[k, :, 0], controller.sensor[k, :, 0]
    error = controller.offset[k, 0] + controller.setpoint[k, 0] - z @ sensor
    most = controller.setpoint[k, 0]
    assert np.allclose(OneWay(controller, 1.0)(k, z, z * 0), np.outer(np.maximum(error, 0), gain), atol=1e-4)
    assert np.allclose(Capped(controller, 1.0)(k, z, z * 0), np.outer(np.minimum(error, most), gain), atol=1e-4)
    assert np.allclose(AfterBlock(controller, 1.0)(k, z * 7, z), z + np.outer(error, gain), atol=1e-4)


def test_after_the_block_the_gain_is_the_optimal_answer_to_what_is_measured_there(bench: Bench) -> None:
    """At the last layer u = -alpha v q / (q + 1) minimises q (alpha - u)^2 + u^2, both over mu^2."""
    controller, law = bench.after_block()
    assert law is AfterBlock
    T = controller.num_layers
    v, q = controller.direction[T - 1, :, 0], controller.weights.q
    assert controller.gain[T - 1, :, 0] == pytest.approx(q / (q + 1) * v, abs=1e-4)
    negative = np.mean([bench.model.residuals([prompt])[0, T] for prompt in SETS[1]], axis=0)
    assert controller.offset[T - 1, 0] == pytest.approx(negative @ v, abs=1e-3)


def test_every_lever_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Model = tiny_on("mlx", "llama")
    monkeypatch.setattr(ablation, "CONCEPTS", ("dog",))
    monkeypatch.setattr(ablation, "_family", lambda model, concept: [3, 4])
    monkeypatch.setattr(mlx_lqr, "bundled_prompts", lambda concept: SETS)
    said: list[str] = []
    file = ablate({"Tiny": model}, tmp_path / "ablation.json", said.append)
    rows = json.loads(file.read_text("utf-8"))
    assert [(row["lever"], row["setting"]) for row in rows] == [(lever, setting) for lever, setting, _ in LEVERS]
    assert {*rows[0]["metrics"]} == {"Tiny: concept in text, %", "Tiny: KL"}
    assert len(said) == len(LEVERS)
    ablate({"Tiny": model}, tmp_path / "ablation.json", said.append)
    assert len(said) == len(LEVERS)  # nothing is measured again
