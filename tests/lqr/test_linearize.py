"""Jacobians against central finite differences of the mlx-lm model itself, run whole in float64 with its own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.by_hand import prefix_of, shifted_output
from helpers.prompts import NOMINAL_PROMPT as PROMPT
from helpers.tiny import FAMILY, tiny
from safetensors.numpy import save_file

import mlx_lqr
from mlx_lqr.backends.mlx import expansion as mlx_expansion
from mlx_lqr.backends.mlx.decoder import MLXTrace
from mlx_lqr.backends.mlx.model import MLXModel


@pytest.mark.parametrize("family", sorted(FAMILY))
def test_jacobian_equals_finite_differences(family: str, random: np.random.Generator) -> None:
    model, step = tiny(family), 1e-3
    # mlx-lm's float64 models still rotate and attend in float32, and gathered products of experts exist in float32
    # only: a smaller step would drown in noise
    exact = model if family in ("mixtral", "qwen3_moe") else tiny(family, dtype=mx.float64)
    with mx.stream(mx.cpu):
        trace = model.trace(PROMPT)
        for layer in range(model.num_layers):
            A = model.jacobian(trace, layer)
            for w in random.standard_normal((3, model.hidden_size)):
                above = shifted_output(exact, PROMPT, layer, step * w)
                below = shifted_output(exact, PROMPT, layer, -step * w)
                difference = (above - below) / (2 * step)
                assert np.linalg.norm(A @ w - difference) < 1e-3 * np.linalg.norm(difference), (family, layer)


@pytest.mark.parametrize(("family", "products"), [("llama", "both"), ("olmo2", "mlp"), ("phi3", "none")])
def test_attention_is_expanded_head_by_head_only_where_heads_are_independent(
    family: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OLMo 2 norms its queries across all heads, Phi-3 has its projections in one: what cannot be expanded is not."""
    expanded: dict[str, bool] = {}
    for name in ("_attention_expansion", "_mlp_expansion"):
        expand = getattr(mlx_expansion, name)

        def watched(*args: Any, name: str = name, expand: Any = expand) -> Any:
            result = expand(*args)
            expanded[name] = result is not None
            return result

        monkeypatch.setattr(mlx_expansion, name, watched)
    model = tiny(family)
    model.jacobian(model.trace(PROMPT), 0)
    assert expanded == {"_attention_expansion": products == "both", "_mlp_expansion": products != "none"}


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["smollm2_folder", "gemma3_folder"])
def test_real_jacobians_equal_finite_differences(
    folder: str, request: pytest.FixtureRequest, random: np.random.Generator
) -> None:
    path = request.getfixturevalue(folder)
    model, exact = mlx_lqr.load(path), mlx_lqr.load(path)
    assert isinstance(exact, MLXModel)
    exact.module.set_dtype(mx.float64)
    tokens = model.tokenizer.encode("Salt from the ocean dried on his skin as he walked along the beach.")
    trace = model.trace(tokens)
    with mx.stream(mx.cpu):
        prefix = prefix_of(exact, tokens)
        for layer in (0, model.num_layers // 2, model.num_layers - 1):
            w = random.standard_normal(model.hidden_size)
            step = max(1e-3, 3e-3 * float(np.sqrt(np.mean(trace.residual[layer] ** 2))))
            near, far = (
                shifted_output(exact, tokens, layer, size * w, prefix)
                - shifted_output(exact, tokens, layer, -size * w, prefix)
                for size in (step, 2 * step)
            )
            difference = (8 * near - far) / (12 * step)  # fourth order, for a step well above the noise
            error = model.jacobian(trace, layer) @ w - difference
            assert np.linalg.norm(error) < 1e-3 * np.linalg.norm(difference), layer


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", sorted({"llama", "gemma3_text", "mixtral", "qwen3_moe"} & FAMILY.keys()))
def test_quantised_model_is_linearised_as_its_unpacked_self(family: str, bits: int) -> None:
    model, unpacked = tiny(family), tiny(family)
    nn.quantize(model.module, group_size=32, bits=bits)
    packed = dict(model.module.named_modules())
    for name, leaf in unpacked.module.named_modules():
        if hasattr(source := packed[name], "scales"):
            packing = {"group_size": source.group_size, "bits": source.bits}
            leaf.weight = mx.dequantize(source.weight, source.scales, source.biases, **packing)
    before = {name: type(module) for name, module in packed.items()}
    jacobians, expected = mlx_lqr.linearize(model, [PROMPT]), mlx_lqr.linearize(unpacked, [PROMPT])
    assert {name: type(module) for name, module in model.module.named_modules()} == before
    for k in range(model.num_layers):
        assert np.abs(jacobians[k] - expected[k]).max() < 1e-4 * np.abs(expected[k]).max()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_16_bit_model_is_linearised_in_float32(dtype: mx.Dtype) -> None:
    """Its Jacobian is that of the same weights in float32, up to where the 16-bit forward pass put the prefix."""
    model, exact = tiny("llama", dtype=dtype), tiny("llama", dtype=dtype)
    exact.module.set_dtype(mx.float32)
    jacobians, expected = mlx_lqr.linearize(model, [[7]]), mlx_lqr.linearize(exact, [[7]])
    assert np.abs(jacobians[0] - expected[0]).max() < 1e-5 * np.abs(expected[0]).max()
    assert model.blocks[0].mlp.down_proj.weight.dtype == dtype


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


def test_a_block_that_overflows_is_named() -> None:
    model = tiny("llama")
    model.blocks[1].mlp.down_proj.weight = model.blocks[1].mlp.down_proj.weight * mx.array(float("inf"))
    with pytest.raises(mlx_lqr.InputError, match="overflow at layer 1"):
        mlx_lqr.linearize(model, [PROMPT])


class Interrupting:
    """Makes the n-th Jacobian of a model an interruption, and counts the layers that were computed."""

    def __init__(self, model: MLXModel, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers: list[int] = []
        jacobian = model.jacobian

        def counted(trace: MLXTrace, layer: int) -> np.ndarray:
            if len(self.layers) == after:
                raise KeyboardInterrupt
            self.layers.append(layer)
            return jacobian(trace, layer)

        monkeypatch.setattr(model, "jacobian", counted)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, file, prompts = tiny("llama", num_hidden_layers=5), tmp_path / "jacobians.safetensors", [PROMPT, PROMPT[:5]]
    expected = mlx_lqr.linearize(model, prompts)
    with pytest.MonkeyPatch.context() as patch:
        first = Interrupting(model, 5, patch)
        with pytest.raises(KeyboardInterrupt):
            mlx_lqr.linearize(model, prompts, store=file)
        assert first.layers == [4, 4, 3, 3, 2]
        assert not file.exists()
    with pytest.MonkeyPatch.context() as patch:
        second = Interrupting(model, 99, patch)
        resumed = mlx_lqr.linearize(model, prompts, store=file)
        assert second.layers == [2, 2, 1, 1, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert all(np.array_equal(a, b) for a, b in zip(resumed, expected, strict=True))


def test_another_run_does_not_go_on_from_it(tmp_path: Path) -> None:
    model, file = tiny("llama"), tmp_path / "jacobians.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        Interrupting(model, 2, patch)
        with pytest.raises(KeyboardInterrupt):
            mlx_lqr.linearize(model, [PROMPT], store=file)
    stored = mlx_lqr.linearize(model, [PROMPT[:3]], store=file)
    expected = mlx_lqr.linearize(model, [PROMPT[:3]])
    assert all(np.array_equal(a, b) for a, b in zip(stored, expected, strict=True))


def test_a_save_takes_nothing_over_from_another_one(tmp_path: Path) -> None:
    """Two sets of Jacobians of one model and of as many prompts differ in nothing but their numbers."""

    class Unreadable(list[np.ndarray]):
        def __getitem__(self, k):  # type: ignore[no-untyped-def]
            if k == 1:
                raise KeyboardInterrupt
            return super().__getitem__(k)

    file = tmp_path / "jacobians.safetensors"
    with pytest.raises(KeyboardInterrupt):
        mlx_lqr.Jacobians(Unreadable([np.zeros((3, 3), np.float32)] * 4)).save(file)
    assert not list(tmp_path.iterdir())
    mlx_lqr.Jacobians([np.eye(3, dtype=np.float32)] * 4).save(file)
    assert all(np.array_equal(A, np.eye(3)) for A in mlx_lqr.Jacobians.load(file))


def test_half_precision_halves_the_file(tmp_path: Path) -> None:
    model = tiny("llama")
    whole = mlx_lqr.linearize(model, [PROMPT], store=tmp_path / "whole")
    half = mlx_lqr.linearize(model, [PROMPT], store=tmp_path / "half", dtype="float16")
    assert (tmp_path / "half").stat().st_size < 0.6 * (tmp_path / "whole").stat().st_size
    for a, b in zip(whole, half, strict=True):
        assert b.dtype == np.float32
        assert np.abs(a - b).max() <= 5e-4 * np.abs(a).max()
    with pytest.raises(mlx_lqr.InputError, match="float32 or float16"):
        mlx_lqr.linearize(model, [PROMPT], store=tmp_path / "x", dtype="int8")


@pytest.mark.parametrize("damage", ["truncated", "text", "missing layer", "not square", "another format", "no file"])
def test_damaged_files_are_refused(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "jacobians.safetensors"
    square, metadata = np.eye(3, dtype=np.float32), {"format": "mlx-lqr jacobians 1"}
    if damage == "missing layer":
        save_file({"jacobian.0": square, "jacobian.2": square}, file, metadata)
    elif damage == "not square":
        save_file({"jacobian.0": square, "jacobian.1": square[:2].copy()}, file, metadata)
    elif damage == "another format":
        save_file({"jacobian.0": square}, file, {"format": "mlx-lqr jacobians 99"})
    elif damage != "no file":
        mlx_lqr.Jacobians([square, square]).save(file)
        file.write_bytes(file.read_bytes()[:-5] if damage == "truncated" else b"hello")
    with pytest.raises(mlx_lqr.InputError) as refusal:
        mlx_lqr.Jacobians.load(file)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("prompts", [[], "not a list", [[]], [[64]], [[-1]]])
def test_unusable_prompts_are_refused(prompts: object) -> None:
    with pytest.raises(mlx_lqr.InputError):
        mlx_lqr.linearize(tiny("llama"), prompts)  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "width"), [(2, None), (3, 3), (3, 4)])
def test_jacobians_of_other_sizes_are_refused(size: int, width: int | None, tmp_path: Path) -> None:
    """A file may claim to be of the model and be of another width, or have a residual stream wider than the state."""
    ones = np.ones((2, 3), np.float32)
    contrast = mlx_lqr.Contrast(ones, 0 * ones, ones, ones[0], (1, 1), fingerprint="f")
    file = tmp_path / "j.safetensors"
    mlx_lqr.Jacobians([np.eye(size, dtype=np.float32)] * 2, "f", "m", 1, width).save(file)
    with pytest.raises(mlx_lqr.InputError, match=r"different models|its width cannot be"):
        mlx_lqr.compile(mlx_lqr.solve(mlx_lqr.Jacobians.load(file)), contrast)
