"""Gates of MLPs by NumPy: the same activations as MLX's own, and only where the formula is known to be the model's."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.controllers import law_for
from helpers.tiny import families, tiny

from mlx_lqr.backends.mlx import gates
from mlx_lqr.backends.mlx.device import REHEARSE, on_linux
from mlx_lqr.backends.mlx.gates import Gates

PROMPTS = [[3, 9, 27, 17, 51, 25, 11, 33, 35, 41], [1, 2, 60, 7], [5]]
TOGETHER = "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "smollm3"
"""Families whose MLPs have a gate, and an activation that is known; Gemma's own is the exact GELU."""
pytestmark = pytest.mark.skipif(not on_linux(), reason="elsewhere MLX has vector instructions")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The activation of each gate that NumPy computes, from now on."""
    calls: list[str] = []

    def counting(activation: Any) -> Any:
        def call(x: np.ndarray) -> np.ndarray:
            calls.append(activation.__name__)
            return activation(x)

        return call

    monkeypatch.setattr(gates, "ACTIVATIONS", tuple(map(counting, gates.ACTIVATIONS)))
    return calls


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "LEAST", 10**9)


@families
def test_all_that_is_read_is_as_mlx_computes_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    model = tiny(family)
    law = law_for(model)
    pairs = [(prompt, [4, 5, 6]) for prompt in PROMPTS]

    def read() -> list[np.ndarray]:
        decoder = model.decoder(law)
        decoder.fill([PROMPTS[0]], steered=True)
        return [
            model.residuals(PROMPTS),
            model.residuals(PROMPTS, law=law, steer_all=True),
            *model.logits_along(pairs, law=law),
            np.array(decoder.step([7])),
            model.trace(PROMPTS[0]).residual,
        ]

    calls.clear()
    quick = read()
    assert bool(calls) is (family in TOGETHER or family == "qwen3_moe")  # one of whose layers has no experts
    without(monkeypatch)
    calls.clear()
    for one, own in zip(quick, read(), strict=True):
        assert np.abs(one - own).max() < 1e-5 * np.abs(own).max()
    assert not calls


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (gates._silu, lambda x: x / (1 + np.exp(-x))),
        (gates._gelu_tanh, lambda x: x / (1 + np.exp(-np.sqrt(8 / np.pi) * (x + 0.044715 * x**3)))),
    ],
)
def test_activations_are_those_of_float64(activation: gates.Activation, expected: Any) -> None:
    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    given = x.copy()
    wanted = expected(x.astype(np.float64))
    assert np.abs(activation(x) - wanted).max() < 3e-6
    assert (x == given).all()
    beyond = np.array([-np.inf, -1e30, -200, 200, np.inf, np.nan], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        own = activation(beyond)
    mlx_own = np.asarray((nn.silu if activation is gates._silu else nn.gelu_approx)(mx.array(beyond)))
    assert (np.isfinite(own) == np.isfinite(mlx_own)).all()  # what overflows is found


class Gated(nn.Module):
    """An MLP with the usual parts, and any activation."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down_proj = nn.Linear(16, 8)
        self._activation = activation

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self._activation(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("activation", [nn.relu, nn.gelu, lambda x: nn.silu(1.001 * x), lambda x: nn.silu(x) + 1e-3])
def test_an_mlp_with_another_activation_stays_as_it_is(activation: Any) -> None:
    mlp = Gated(activation)
    assert gates._activation_of(mlp, 8) is None
    block = nn.Module()
    block.mlp = mlp
    x = mx.random.normal((1, gates.LEAST, 8))
    with Gates([block], mx.float32, 8).quick(x[..., 0]):
        assert type(mlp) is Gated


def test_an_mlp_that_gives_zeros_says_nothing_of_its_activation() -> None:
    mlp = Gated(nn.relu)
    mlp.gate_proj.weight, mlp.gate_proj.bias = mx.zeros((16, 8)), mx.zeros(16)
    mlp.down_proj.bias = mx.zeros(8)
    assert gates._activation_of(mlp, 8) is None


def test_each_mlp_is_looked_at_by_itself() -> None:
    """Several of one class may have another activation each."""
    blocks = [nn.Module(), nn.Module(), nn.Module()]
    for block, activation in zip(blocks, (nn.silu, nn.relu, nn.gelu_approx), strict=True):
        block.mlp = Gated(activation)
    x = mx.random.normal((1, gates.LEAST, 8))
    expected = [np.asarray(block.mlp(x)) for block in blocks]
    with Gates(blocks, mx.float32, 8).quick(x[..., 0]):
        assert [type(block.mlp) is Gated for block in blocks] == [False, True, False]
        for block, own in zip(blocks, expected, strict=True):
            assert np.allclose(np.asarray(block.mlp(x)), own, atol=1e-6)


def test_rows_are_taken_in_pieces_of_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = Gated(nn.silu)
    x = mx.random.normal((2, 7, 8))
    expected = np.asarray(mlp(x))
    for rows in (1, 3, 14, 100):
        monkeypatch.setattr(gates, "_PIECE", 16 * rows + 5)
        assert np.allclose(np.asarray(gates._output(mlp, gates._silu, x)), expected, atol=1e-6)
    monkeypatch.setattr(gates, "_PIECE", 1)  # less than a row
    assert np.allclose(np.asarray(gates._output(mlp, gates._silu, x)), expected, atol=1e-6)


def test_packed_weights_have_quick_gates_too() -> None:
    mx.random.seed(0)
    mlp = Gated(nn.silu)
    mlp.gate_proj, mlp.up_proj = nn.Linear(64, 64), nn.Linear(64, 64)
    mlp.down_proj = nn.Linear(64, 64)
    nn.quantize(mlp)
    assert gates._activation_of(mlp, 64) is gates._silu


def test_few_tokens_other_numbers_and_gpus_keep_mlx_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    mlp = model.blocks[0].mlp
    kind = type(mlp)

    def is_quick(of: Gates, tokens: int) -> bool:
        with of.quick(mx.zeros((1, tokens))):
            return type(mlp) is not kind

    assert is_quick(model._gates, gates.LEAST)
    assert not is_quick(model._gates, gates.LEAST - 1)
    assert not is_quick(Gates(model.blocks, mx.bfloat16, model.hidden_size), gates.LEAST)
    monkeypatch.setenv(REHEARSE, "metal")
    assert not is_quick(Gates(model.blocks, mx.float32, model.hidden_size), gates.LEAST)


def test_derivatives_are_of_the_model_s_own_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    trace = model.trace(PROMPTS[0])
    calls = counted(monkeypatch)
    model.jacobian(trace, 1)
    model.vjp(trace, 1, np.eye(2, model.hidden_size, dtype=np.float32))
    assert not calls
