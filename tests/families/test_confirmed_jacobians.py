"""The faster Jacobian of models that are on no list is that of the general way, or it is not taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.architectures import CONFIGS, model_of, module_of

from mlx_lqr.backends.mlx import confirmed
from mlx_lqr.backends.mlx.confirmed import confirmed_jacobian
from mlx_lqr.backends.mlx.measured_model import MeasuredModel

PROMPT = [5, 9, 2, 33, 7, 51, 20, 11, 3]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_LQR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(
    ("family", "layers"),
    [("glm4", range(4)), ("gpt_oss", range(4)), ("gemma3", range(4)), ("qwen3_next", (1, 3)), ("mamba2", ())],
)
def test_where_it_is_taken_it_is_the_same(family: str, layers: Any) -> None:
    model = model_of(family)
    trace = model.trace(PROMPT)
    taken = {}
    for k in range(model.num_layers):
        block, z = trace.blocks[k], trace.residual[k]
        taken[k] = A = confirmed_jacobian(block, z)
        general = block.jacobian(z)
        assert A is None or np.linalg.norm(A - general) < 1e-5 * np.linalg.norm(general)
    assert [k for k, A in taken.items() if A is not None] == list(layers)


def test_a_block_without_attention_is_not_expanded() -> None:
    trace = model_of("glm4").trace(PROMPT)
    bare = nn.Module()
    bare.self_attn = None
    assert confirmed_jacobian(replace(trace.blocks[0], block=bare), trace.residual[0]) is None


def test_attention_with_a_gate_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the expansion sees that the input goes another way too; one direction through the block does."""
    module = module_of("glm4")
    for block in module.layers:
        gate(block.self_attn)
    model = MeasuredModel(module, CONFIGS["glm4"], "gated")
    trace = model.trace(PROMPT)
    block, z = trace.blocks[1], trace.residual[1]
    general = block.jacobian(z)
    assert confirmed_jacobian(block, z) is None
    assert np.array_equal(model.jacobian(trace, 1), general)
    monkeypatch.setattr(confirmed, "TOLERANCE", np.inf)
    wrong = confirmed_jacobian(block, z)
    assert wrong is not None
    assert np.linalg.norm(wrong - general) > 1e-2 * np.linalg.norm(general)


def gate(attention: nn.Module) -> None:
    kind = type(attention)

    def call(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        output: mx.array = kind.__call__(self, x, *args, **kwargs) * mx.sigmoid(3 * x)
        return output

    object.__setattr__(attention, "__class__", type(kind.__name__, (kind,), {"__call__": call}))
