"""Models that are on no list decode with compiled steps, which give what plain ones give, or with plain ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.architectures import CONFIGS, model_of, module_of
from helpers.controllers import law_for

from mlx_lqr.backends.mlx import decoder as mlx_decoder
from mlx_lqr.backends.mlx import step as mlx_step
from mlx_lqr.backends.mlx.measured_decoder import MeasuredDecoder
from mlx_lqr.backends.mlx.measured_model import MeasuredModel
from mlx_lqr.backends.mlx.step import CompiledStep
from mlx_lqr.backends.protocol import Law

PROMPT = [5, 9, 2, 33, 7, 51, 20, 11, 3]
TOKENS = [int(token) for token in np.random.default_rng(0).integers(1, 64, 12)]
RECORDED = ["gpt_oss", "gemma3", "qwen3_next", "lfm2", "mamba2", "olmo3"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_LQR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths at which compiled steps were taken; they are from the first one on, in buffers that soon are full."""
    monkeypatch.setattr(mlx_decoder, "COMPILE_AFTER", 0)
    monkeypatch.setattr(mlx_step, "STEP", 8)
    lengths: list[int] = []
    honest = CompiledStep.__call__

    def counted(self: CompiledStep, tokens: mx.array, cache: Any, law: Any, arrays: Any) -> Any:
        result = honest(self, tokens, cache, law, arrays)
        lengths.append(cache.length)
        return result

    monkeypatch.setattr(CompiledStep, "__call__", counted)
    return lengths


def logits(model: MeasuredModel, law: Law | None, monkeypatch: pytest.MonkeyPatch, *, plain: bool) -> np.ndarray:
    """Of steps with a rewind, a prompt and a trace between them."""
    with monkeypatch.context() as patch:
        if plain:
            patch.setattr(mlx_decoder, "COMPILE_AFTER", 10**9)
        decoder = model.decoder(law)
        assert isinstance(decoder, MeasuredDecoder)
        decoder.fill([PROMPT[:-1]], steered=False)
        steps = [np.array(decoder.step([token])) for token in [PROMPT[-1], *TOKENS[:3]]]
        if decoder.rewind(decoder.position - 2):
            steps.append(np.array(decoder.step([TOKENS[3]])))
        decoder.fill([TOKENS[4:6]], steered=True)
        residual = decoder.trace(TOKENS[6]).residual
        steps += [np.array(decoder.step([token])) for token in TOKENS[6:]]
    return np.concatenate([*steps, residual[:, : steps[0].shape[-1]]], axis=None)


@pytest.mark.parametrize("family", RECORDED)
def test_steps_equal_plain_ones(family: str, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = MeasuredModel(module_of(family), CONFIGS[family], family)
    law = law_for(model)
    for steering in (law, None):
        calls.clear()
        compiled = logits(model, steering, monkeypatch, plain=False)
        assert len(calls) >= 10
        calls.clear()
        plain = logits(model, steering, monkeypatch, plain=True)
        assert not calls
        assert np.abs(compiled - plain).max() < 1e-4 * np.abs(plain).max()


def test_what_cannot_be_recorded_is_not(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that asks for the value of a position, and one that does something else with another mask."""

    def ask(self: nn.Module, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        output: mx.array = kind.__call__(self, x, mask, cache)
        return output + 0 * int(cache.offset)

    def look(self: nn.Module, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        output: mx.array = kind.__call__(self, x, mask, cache)
        return output + 0.1 if isinstance(mask, mx.array) else output

    for call, tried_steps in ((ask, 0), (look, 2)):
        module = module_of("glm4")
        kind = type(module.layers[1].self_attn)
        object.__setattr__(module.layers[1].self_attn, "__class__", type("Odd", (kind,), {"__call__": call}))
        model = MeasuredModel(module, CONFIGS["glm4"], "odd")
        calls.clear()
        tried = logits(model, None, monkeypatch, plain=False)
        assert len(calls) == tried_steps
        assert np.array_equal(tried, logits(model, None, monkeypatch, plain=True))


def test_a_step_that_fails_later_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, honest = model_of("olmo3"), mlx_step._Slots.make_mask

    def failing(self: Any, *args: Any, **options: Any) -> Any:
        if self.keys.shape[-2] > 16:
            raise RuntimeError("no such mask")
        return honest(self, *args, **options)

    monkeypatch.setattr(mlx_step._Slots, "make_mask", failing)
    compiled = logits(model, law_for(model), monkeypatch, plain=False)
    plain = logits(model, law_for(model), monkeypatch, plain=True)
    assert np.abs(compiled - plain).max() < 1e-4 * np.abs(plain).max()
