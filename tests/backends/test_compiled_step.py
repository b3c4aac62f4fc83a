"""Compiled steps give what plain steps give, whatever happens between them, and are recorded no more than needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.controllers import controller_for
from helpers.tiny import FAMILY, tiny
from mlx.utils import tree_map

import mlx_lqr
from mlx_lqr.backends.mlx import decoder as mlx_decoder
from mlx_lqr.backends.mlx import step as mlx_step
from mlx_lqr.backends.mlx.decoder import MLXDecoder
from mlx_lqr.backends.mlx.model import MLXModel
from mlx_lqr.methods.alqr import LinearFeedback

PROMPT = [5, 17, 3, 42, 8, 29, 11, 60, 2, 33]
TOKENS = [int(token) for token in np.random.default_rng(0).integers(1, 64, 24)]


@pytest.fixture(autouse=True)
def from_the_first_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """With buffers that soon are full, too."""
    monkeypatch.setattr(mlx_decoder, "COMPILE_AFTER", 0)
    monkeypatch.setattr(mlx_step, "STEP", 8)


def both_ways(
    model: MLXModel, work: Callable[[MLXDecoder], Any], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Any, Any]:
    """What `work` returns with a decoder of compiled steps, and with one of plain steps."""
    compiled = work(model.decoder(**options))
    with monkeypatch.context() as patch:
        patch.setattr(mlx_decoder, "COMPILE_AFTER", 10**9)
        return compiled, work(model.decoder(**options))


def logits_of_steps(decoder: MLXDecoder) -> np.ndarray:
    decoder.fill([PROMPT[:-1]], steered=False)
    return np.concatenate([np.array(decoder.step([token])) for token in [PROMPT[-1], *TOKENS]])


@pytest.mark.parametrize("family", sorted(FAMILY))
def test_steps_equal_plain_ones_in_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows of 6 tokens are full from the start, the buffers of 8 slots at once and again and again."""
    model = tiny(family)
    law = LinearFeedback(controller_for(model, layers=[0, 2]), 2.0)
    compiled, plain = both_ways(model, logits_of_steps, monkeypatch, law=law)
    assert np.abs(compiled - plain).max() < 1e-4
    assert np.abs(compiled - both_ways(model, logits_of_steps, monkeypatch)[0]).max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_context_that_rolls(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family, max_position_embeddings=16)
    compiled, plain = both_ways(model, logits_of_steps, monkeypatch, rolling=True)
    assert np.abs(compiled - plain).max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("rolling", [False, True])
def test_whatever_happens_between_steps(family: str, rolling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family, max_position_embeddings=20)

    def work(decoder: MLXDecoder) -> list[np.ndarray]:
        answers: list[Any] = []

        def steps(tokens: list[int]) -> None:
            answers.extend(np.array(decoder.step([token])) for token in tokens)

        decoder.fill([PROMPT[:3]], steered=False)
        steps(TOKENS[:2])
        if decoder.rewind(4):
            assert decoder.position == 4
        steps(TOKENS[2:5])
        decoder.fill([PROMPT[3:6]], steered=False)
        answers.append(decoder.trace(7).residual)
        steps(TOKENS[5:8])
        assert 0 <= decoder.sample(decoder.step([9])).item() < model.vocab_size
        if rolling:
            steps(TOKENS[8:])
            decoder.fill([PROMPT], steered=False)
            steps(TOKENS)
        return answers

    for compiled, plain in zip(*both_ways(model, work, monkeypatch, rolling=rolling), strict=True):
        assert np.abs(compiled - plain).max() < 1e-4


def test_another_strength_or_controller_records_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    recorded = []
    original = mlx_step.CompiledStep._step

    def counted(self: mlx_step.CompiledStep, *args: Any) -> Any:
        step = original(self, *args)

        def run(*given: Any) -> Any:
            recorded.append(given)
            return step(*given)

        return run

    monkeypatch.setattr(mlx_step.CompiledStep, "_step", counted)
    monkeypatch.setattr(mlx_step, "STEP", 64)
    one, other = (
        controller_for(model),
        mlx_lqr.fit(model, [[9, 1], [2, 2, 4]], [[33], [40, 41]], cost="feature", layers="all"),
    )

    def work(decoder: MLXDecoder) -> np.ndarray:
        law = LinearFeedback(one, 1.0)
        decoder.law = law
        decoder.fill([PROMPT[:-1]], steered=False)
        logits = []
        for strength in (1.0, 3.0, -2.0):
            law.strength = strength
            logits += [np.array(decoder.step([token])) for token in TOKENS[:3]]
        decoder.law = LinearFeedback(other, 2.0)
        logits += [np.array(decoder.step([token])) for token in TOKENS[3:6]]
        return np.concatenate(logits)

    compiled, plain = both_ways(model, work, monkeypatch)
    assert len(recorded) == 1
    assert np.abs(compiled - plain).max() < 1e-4


def test_weights_that_change_are_seen() -> None:
    model = tiny("llama")
    decoder = model.decoder()
    decoder.fill([PROMPT[:-1]], steered=False)
    decoder.step([1])
    position = decoder.position
    before = np.array(decoder.step([2]))
    assert decoder.rewind(position)
    head = model.module.model.norm
    head.update(tree_map(lambda weight: 2 * weight, head.parameters()))
    assert np.allclose(np.array(decoder.step([2])), 2 * before, rtol=1e-4, atol=1e-4)


def test_a_law_with_effects_is_never_replayed() -> None:
    class Counting(LinearFeedback):
        calls = 0

        def __call__(self, layer: int, z: mx.array, output: mx.array) -> mx.array:
            Counting.calls += 1
            return super().__call__(layer, z, output)

    model = tiny("llama")
    law = Counting(controller_for(model), 1.0)
    law.replayable = False
    decoder = model.decoder(law)
    decoder.fill([PROMPT[:-1]], steered=False)
    for token in TOKENS[:4]:
        decoder.step([token])
    assert Counting.calls == 4 * len(law.layers)
