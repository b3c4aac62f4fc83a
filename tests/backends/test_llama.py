"""llama.cpp against MLX on the same weights: a GGUF file in float32, tiny ones, and the demonstration model's own."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_lqr
from mlx_lqr import Controller, InputError

pytest.importorskip("llama_cpp")

from helpers import gguf_float32
from helpers.llama_products import in_float32, on_a_gpu

from mlx_lqr.backends.llama.hook import PythonHook
from mlx_lqr.backends.llama.library import llama
from mlx_lqr.methods.alqr import LinearFeedback

PROMPTS = ("Once upon a time,", "The best thing about my home is that", "What would you like to do today?")


@pytest.fixture(scope="module")
def exact(smollm2_gguf: Path, smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """SmolLM2 in float32: llama.cpp's and MLX's."""
    file = gguf_float32.in_float32(smollm2_gguf, tmp_path_factory.mktemp("llama") / "smollm2-f32.gguf")
    return mlx_lqr.load(file, backend="llama"), mlx_lqr.load(smollm2_folder, backend="mlx", dtype="float32")


@pytest.fixture(scope="module")
def controllers(exact: tuple[Any, Any]) -> list[Controller]:
    return fitted(exact[1], [12, 20, 24, 26, 28, 29], 10)


def fitted(model: Any, layers: list[int], prompts: int) -> list[Controller]:
    """Controllers for three concepts, from so many prompts of each kind."""
    concepts = ("ocean", "dog", "love")
    sets = {concept: [texts[:prompts] for texts in mlx_lqr.bundled_prompts(concept)] for concept in concepts}
    jacobians = mlx_lqr.linearize(model, sets["ocean"][0][:1])
    return [
        mlx_lqr.fit(model, *texts, concept=concept, layers=layers, jacobians=jacobians)
        for concept, texts in sets.items()
    ]


def strengths(count: int) -> list[float]:
    return [1.5, 0.6, 0.4][:count]


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest error of a layer, by the length of its own stream."""
    return float((np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())


def steering(controllers: list[Controller], count: int, positions: Any) -> Controller:
    return Controller.combine(*(replace(one, positions=positions) for one in controllers[:count]))


def test_a_file_is_the_same_model(exact: tuple[Any, Any]) -> None:
    ours, mlx = exact
    assert ours.fingerprint == mlx.fingerprint
    for name in ("num_layers", "hidden_size", "vocab_size", "context_length"):
        assert getattr(ours, name) == getattr(mlx, name)
    assert ours.description.parameters == mlx.description.parameters
    assert ours.description.packing == ""


def test_tokens_and_texts_are_the_same(exact: tuple[Any, Any]) -> None:
    ours, expected = (model.tokenizer for model in exact)
    assert ours.end_tokens == expected.end_tokens
    assert ours.special_tokens == expected.special_tokens
    assert ours.first_token == expected.first_token
    message = [{"role": "user", "content": "What is  this?\n"}]
    assert ours.chat(message) == expected.chat(message)
    assert ours.continuations("I like ", ["cats", "dogs"]) == expected.continuations("I like ", ["cats", "dogs"])
    assert ours.continuations([1, 5], [" x"]) == expected.continuations([1, 5], [" x"])
    for text in ("", " ", "  two  spaces\n\n12345", "日本語 ünïcode 🙂🙂", "<|im_start|>user\nhi<|im_end|>\n"):
        tokens = expected.encode(text)
        assert ours.encode(text) == tokens
        for skipped in (True, False):
            whole = expected.decode(tokens, skip_special_tokens=skipped)
            assert ours.decode(tokens, skip_special_tokens=skipped) == whole
        for cut in range(len(tokens)):
            streams = [one.stream(tokens[:cut]) for one in (ours, expected)]
            pieces = ["".join([*map(one.add, tokens[cut:]), one.finish()]) for one in streams]
            assert pieces[0] == pieces[1]
    with pytest.raises(InputError, match="half a surrogate"):
        ours.encode("\ud800")


@in_float32()
@pytest.mark.parametrize("steer_all", [False, True])
def test_streams_and_probabilities_agree(
    exact: tuple[Any, Any], controllers: list[Controller], steer_all: bool
) -> None:
    ours, mlx = exact
    prompts = [mlx.tokenizer.encode(text) for text in PROMPTS]
    pairs = [(prompt[:3], prompt[3:]) for prompt in prompts]
    for law in (None, LinearFeedback(controllers[0], 2.0)):
        options = {"law": law, "steer_all": steer_all}
        assert relative(ours.residuals(prompts, **options), mlx.residuals(prompts, **options)) < 1e-4
        assert np.abs(ours.logits(prompts[0], **options) - mlx.logits(prompts[0], **options)).max() < 5e-3
        for scored, expected in zip(*(m.log_probabilities(pairs, **options) for m in exact), strict=True):
            np.testing.assert_allclose(scored, expected, atol=2e-3)
        for along, expected in zip(*(m.logits_along(pairs, **options) for m in exact), strict=True):
            np.testing.assert_allclose(along, expected, atol=5e-3)


def with_laws_in_python(model: Any) -> Any:
    """The same file again, steered as where there is no C compiler."""
    again: Any = mlx_lqr.load(model.file, backend="llama")
    again._context._make_hook = lambda: PythonHook(again.num_layers, again.hidden_size)
    return again


def check_tokens(ours: Any, mlx: Any, steered: Controller, strength: Any) -> None:
    """64 of them are MLX's, with laws in C and in Python, and others than unsteered."""
    options: Any = {"max_tokens": 64, "temperature": 0.0}
    in_c, in_python, expected = (
        [piece.token for piece in mlx_lqr.stream(model, PROMPTS[0], controller=steered, strength=strength, **options)]
        for model in (ours, with_laws_in_python(ours), mlx)
    )
    assert in_c == in_python == expected
    assert len(expected) == 64
    assert expected != [piece.token for piece in mlx_lqr.stream(ours, PROMPTS[0], **options)]


@in_float32()
@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("concepts", [1, 3])
def test_steered_tokens_are_mlx_own(
    exact: tuple[Any, Any], controllers: list[Controller], positions: str, concepts: int
) -> None:
    check_tokens(*exact, steering(controllers, concepts, positions), strengths(concepts))


def test_a_quantised_file_is_near_mlx_own_of_it(smollm2_gguf: Path, exact: tuple[Any, Any]) -> None:
    """llama.cpp's products of quantised weights round the activations too, CUDA's most."""
    _, mlx = exact
    quantised = mlx_lqr.load(smollm2_gguf, backend="llama")
    prompts = [mlx.tokenizer.encode(text) for text in PROMPTS]
    ours, expected = quantised.residuals(prompts), mlx.residuals(prompts)
    most, worst = (0.07, 0.2) if on_a_gpu() else (0.03, 0.05)
    assert 0 < np.linalg.norm(ours - expected) / np.linalg.norm(expected) < most
    assert relative(ours, expected) < worst  # at a layer of a prompt
    assert quantised.fingerprint == mlx.fingerprint
    assert quantised.description.packing == "Q4_1"
    assert quantised.description.nbytes < 100e6


@in_float32()
@pytest.mark.slow
def test_gemma_is_steered_alike(gemma3_gguf: Path, gemma3_folder: Path, tmp_path: Path) -> None:
    ours = mlx_lqr.load(gguf_float32.in_float32(gemma3_gguf, tmp_path / "gemma-f32.gguf"), backend="llama")
    mlx = mlx_lqr.load(gemma3_folder, backend="mlx", dtype="float32")
    assert ours.fingerprint == mlx.fingerprint
    controllers = fitted(mlx, [10, 13, 16, 17], 6)
    for positions in ("last", "all"):
        for concepts in (1, 3):
            check_tokens(ours, mlx, steering(controllers, concepts, positions), strengths(concepts))


def test_a_context_is_freed_before_the_model_that_it_uses(smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where both are collected at once, as parts of a cycle, of which the older one goes first."""
    gc.collect()  # what other tests have left
    freed: list[str] = []
    for name in ("llama_free", "llama_model_free"):
        free = getattr(llama(), name)
        monkeypatch.setattr(llama(), name, lambda pointer, name=name, free=free: (freed.append(name), free(pointer)))
    model: Any = mlx_lqr.load(smollm2_gguf, backend="llama")
    mlx_lqr.generate(model, "Once", max_tokens=2, temperature=0)
    model.itself = model
    del model
    gc.collect()
    assert freed == ["llama_free", "llama_model_free"]
