"""Jacobians against central finite differences of the mlx-lm model itself, run whole in float64 with its own cache."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny import FAMILY, tiny

import mlx_lqr
from mlx_lqr.backends.mlx import MLXModel
from mlx_lqr.backends.mlx_blocks import BlockCall, hooked

PROMPT = [5, 17, 3, 42, 8, 29, 11, 60, 2, 33]  # longer than the tiny models' sliding windows of 6


def shifted_output(model: MLXModel, tokens: list[int], layer: int, shift: np.ndarray) -> np.ndarray:
    """Output of block `layer` at the last token when its input there is shifted; every block runs as mlx-lm runs it."""
    found: list[mx.array] = []

    def hook(k: int, z: mx.array, call: BlockCall) -> mx.array:
        moved = z.at[0, -1].add(mx.array(shift, z.dtype))
        output = call(moved)
        found.append(output[0, -1])
        return output

    cache = model.module.make_cache() if hasattr(model.module, "make_cache") else None
    if cache is None:
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(model.module)
    model.module(mx.array([tokens[:-1]]), cache=cache)
    with hooked(model.blocks, hook, [layer]):
        model.module(mx.array([tokens[-1:]]), cache=cache)
    return np.asarray(found[0].astype(mx.float64), dtype=np.float64)


@pytest.mark.parametrize("family", sorted(FAMILY))
def test_jacobian_equals_finite_differences(family: str, random: np.random.Generator) -> None:
    model = tiny(family)
    exact = tiny(family, dtype=mx.float64)
    step = 1e-3  # mlx-lm's float64 models still rotate and attend in float32, so a smaller step drowns in noise
    with mx.stream(mx.cpu):
        trace = model.trace(PROMPT)
        for layer in range(model.num_layers):
            A = model.jacobian(trace, layer)
            for w in random.standard_normal((3, model.hidden_size)):
                above = shifted_output(exact, PROMPT, layer, step * w)
                below = shifted_output(exact, PROMPT, layer, -step * w)
                difference = (above - below) / (2 * step)
                assert np.linalg.norm(A @ w - difference) < 1e-3 * np.linalg.norm(difference), (family, layer)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_model_is_linearised_as_its_unpacked_self(bits: int) -> None:
    model = tiny("llama")
    nn.quantize(model.module, group_size=32, bits=bits)
    packed = mlx_lqr.linearize(model, [PROMPT])
    before = [type(leaf).__name__ for leaf in model.module.modules()]
    dequantised = tiny("llama")
    _unpack_into(model, dequantised)
    plain = mlx_lqr.linearize(dequantised, [PROMPT])
    assert [type(leaf).__name__ for leaf in model.module.modules()] == before
    for k in range(model.num_layers):
        assert np.abs(packed[k] - plain[k]).max() < 1e-4 * np.abs(plain[k]).max()


def _unpack_into(model: MLXModel, other: MLXModel) -> None:
    packed = dict(model.module.named_modules())
    for name, leaf in other.module.named_modules():
        if hasattr(packed[name], "scales"):
            source = packed[name]
            leaf.weight = mx.dequantize(
                source.weight, source.scales, source.biases, group_size=source.group_size, bits=source.bits
            )


def test_jacobians_are_averaged_over_prompts() -> None:
    model = tiny("qwen3")
    prompts = [PROMPT, PROMPT[:4], [7]]
    single = [mlx_lqr.linearize(model, [prompt]) for prompt in prompts]
    together = mlx_lqr.linearize(model, prompts)
    assert together.prompt_count == 3
    for k in range(model.num_layers):
        assert np.allclose(together[k], np.mean([one[k] for one in single], axis=0), atol=1e-6)


def test_only_the_first_32_tokens_count() -> None:
    model = tiny("llama")
    long = [(7 * i) % 64 for i in range(50)]
    assert np.array_equal(mlx_lqr.linearize(model, [long])[0], mlx_lqr.linearize(model, [long[:32]])[0])


def test_stored_jacobians_come_back(tmp_path: Path) -> None:
    model = tiny("llama")
    jacobians = mlx_lqr.linearize(model, [PROMPT])
    jacobians.save(tmp_path / "jacobians.safetensors")
    loaded = mlx_lqr.Jacobians.load(tmp_path / "jacobians.safetensors")
    assert loaded.fingerprint == model.fingerprint
    assert loaded.prompt_count == 1
    assert all(np.array_equal(a, b) for a, b in zip(loaded, jacobians, strict=True))


def test_a_jacobian_that_is_not_finite_is_named() -> None:
    model = tiny("llama")
    model.blocks[1].mlp.down_proj.weight = model.blocks[1].mlp.down_proj.weight * mx.array(float("inf"))
    with pytest.raises(mlx_lqr.InputError, match="layer 2"):
        mlx_lqr.linearize(model, [PROMPT])


@pytest.mark.parametrize("prompts", [[], "not a list", [[]], [[64]], [[-1]]])
def test_unusable_prompts_are_refused(prompts: object) -> None:
    with pytest.raises(mlx_lqr.InputError):
        mlx_lqr.linearize(tiny("llama"), prompts)  # type: ignore[arg-type]
