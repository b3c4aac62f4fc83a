"""What overflows is never decoded, scored or recorded in silence, steered or not, wherever in the model it happens.

Each model here works in float32 and bfloat16, and overflows float16 at one place.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.backends import BACKENDS, tiny_folder
from safetensors.numpy import load_file, save_file

import mlx_lqr
from mlx_lqr import InputError, tasks
from mlx_lqr.backends.protocol import GREEDY, CarryingLaw, Law, Model, Sampling
from mlx_lqr.commands import main
from mlx_lqr.errors import OverflowingError
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.methods.steering import law_of as law_of_steering
from mlx_lqr.runtime.decode import decode
from mlx_lqr.tasks.damage import NeutralText

every_backend = pytest.mark.parametrize("backend", BACKENDS)

PROMPT = [5, 17, 3, 42, 8]
LARGE = 3e4

PLACES: dict[str, tuple[str, dict[str, float], str]] = {
    "embedding": ("gemma", {"model.embed_tokens.weight": 2 * LARGE}, "in the embedding"),
    "queries": ("llama", {"model.layers.1.self_attn.q_proj.weight": 2 * LARGE}, "at layer 1"),
    "attention": ("llama", {"model.layers.1.self_attn.o_proj.weight": 2 * LARGE}, "at layer 1"),
    "MLP": ("qwen3", {"model.layers.1.mlp.down_proj.weight": 2 * LARGE}, "at layer 1"),
    "final norm": ("llama", {"model.norm.weight": LARGE}, "after the last layer"),
    "head": ("qwen2", {"lm_head.weight": 2 * LARGE}, "after the last layer"),
}
"""Where: the family, what is multiplied there, and how the error words it."""


@functools.cache
def folder_of(place: str) -> Path:
    family, factors, _ = PLACES[place]
    folder = tiny_folder(family)
    weights = load_file(folder / "model.safetensors")
    for name, factor in factors.items():
        weights[name] = weights[name] * np.float32(factor)
    save_file(weights, folder / "model.safetensors", {"format": "mlx"})
    return folder


@functools.cache
def model_of(place: str, backend: str, dtype: str) -> Model:
    return mlx_lqr.load(folder_of(place), backend=backend, dtype=dtype)  # type: ignore[arg-type]


@functools.cache
def law_of(place: str, backend: str) -> LinearFeedback:
    """Fitted in float32."""
    model = model_of(place, backend, "float32")
    return LinearFeedback(mlx_lqr.fit(model, [[1, 2, 3], [4, 5]], [[6, 7], [8]], q=0.1, layers=[1]), 0.01)


def answers(model: Model, law: Law | None, *prompts: list[int], sampling: Sampling = GREEDY) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in prompts]
    for i, token in decode(model, prompts, law=law, sampling=sampling, max_tokens=4):
        texts[i].append(token)
    return texts


WORK: dict[str, Callable[[Model, Law | None], Any]] = {
    "decoding": lambda model, law: answers(model, law, PROMPT),
    "sampling": lambda model, law: answers(model, law, PROMPT, sampling=Sampling(1.0, seed=0, repetition_penalty=1.1)),
    "batch": lambda model, law: answers(model, law, PROMPT, PROMPT[:2], PROMPT[1:]),
    "logits": lambda model, law: model.logits(PROMPT, law=law),
    "log-probabilities": lambda model, law: model.log_probabilities([(PROMPT, [3, 4]), ([1], [2])], law=law),
    "logits along": lambda model, law: model.logits_along([(PROMPT, [3, 4]), ([1], [2])], law=law),
}
RESIDUAL_WORK: dict[str, Callable[[Model, Law | None], Any]] = {
    "residuals": lambda model, law: model.residuals([PROMPT, PROMPT[:2]], law=law),
    "trace": lambda model, law: model.trace(PROMPT),
    "heads": lambda model, law: model.head_outputs([PROMPT, PROMPT[:2]]),
}


@every_backend
@pytest.mark.parametrize("steered", [False, True], ids=["unsteered", "steered"])
@pytest.mark.parametrize("place", PLACES)
def test_an_overflow_anywhere_is_one_line_that_names_the_layer(backend: str, place: str, steered: bool) -> None:
    words = PLACES[place][2]
    mend = "lower the strength, or load" if steered else "load the model with dtype bfloat16 or float32"
    model = model_of(place, backend, "float16")
    law = law_of(place, backend) if steered else None
    inside = words != "after the last layer"
    for work in [*WORK.values(), *(list(RESIDUAL_WORK.values())[: 1 if steered else None] if inside else [])]:
        with pytest.raises(OverflowingError, match=rf"overflow.* {words}.*: {mend}") as raised:
            work(model, law)
        assert "\n" not in str(raised.value)


@every_backend
@pytest.mark.parametrize("place", PLACES)
def test_where_nothing_overflows_nothing_is_refused(backend: str, place: str) -> None:
    for dtype in ("float32", "bfloat16"):
        model = model_of(place, backend, dtype)
        for work in [*WORK.values(), *RESIDUAL_WORK.values()]:
            work(model, law_of(place, backend))
            work(model, None)


@every_backend
def test_only_the_sequence_that_overflows_is_refused(backend: str) -> None:
    """Tokens 0 and 7, of a direction of their own, overflow in the first MLP; none is padded with 0."""
    folder = tiny_folder("llama", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = np.isin(np.arange(64), [0, 7])
    weights["model.layers.0.self_attn.o_proj.weight"][0] = 0
    for name in ("gate", "up"):
        weights[f"model.layers.0.mlp.{name}_proj.weight"][:, 0] = 1000
    save_file(weights, folder / "model.safetensors", {"format": "mlx"})
    model = mlx_lqr.load(folder, backend=backend, dtype="float16")  # type: ignore[arg-type]
    prompts = [[5], PROMPT, PROMPT[:3], PROMPT * 4]
    assert answers(model, None, *prompts) == [answers(model, None, prompt)[0] for prompt in prompts]
    for spoiled in ([7], [7, 2, 3, 4, 5, 6], [2, 3, 7, 4], [1, 2, 7]):
        for sampling in (GREEDY, Sampling(0.8, seed=1)):
            with pytest.raises(OverflowingError, match="float16 at layer 0"):
                answers(model, None, *prompts, spoiled, sampling=sampling)
        with pytest.raises(OverflowingError, match="float16 at layer 0"):
            model.log_probabilities([(PROMPT, [1]), (spoiled, [4])])


@every_backend
def test_damaged_weights_say_so(backend: str) -> None:
    folder = tiny_folder("llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "mlx"})
    model = mlx_lqr.load(folder, backend=backend, dtype="float32")  # type: ignore[arg-type]
    with pytest.raises(OverflowingError, match="at layer 1: the model is damaged"):
        mlx_lqr.generate(model, PROMPT, max_tokens=2, temperature=0)


@every_backend
@pytest.mark.parametrize("temperature", [1e-12, 1e-40, 1e-300])
def test_the_lowest_temperatures_draw_the_most_likely_token(backend: str, temperature: float) -> None:
    model = mlx_lqr.load(tiny_folder("llama"), backend=backend, dtype="float32")  # type: ignore[arg-type]
    for options in ({}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}):
        drawn = answers(model, None, PROMPT, PROMPT[1:], sampling=Sampling(temperature, seed=3, **options))
        assert drawn == answers(model, None, PROMPT, PROMPT[1:])


def test_16_bits_are_drawn_from_as_exactly_as_32() -> None:
    from mlx_lqr.backends.mlx.framework import MLXFramework
    from mlx_lqr.backends.mlx.sampling import MLXSampler

    framework = MLXFramework(mx.bfloat16)
    logits = (12 + 4 * mx.random.normal((256, 500), key=mx.random.key(0))).astype(mx.bfloat16)
    for options in ({}, {"top_p": 0.8}, {"min_p": 0.2}):
        expected = MLXSampler(framework, Sampling(1.0, seed=5, **options)).draw(logits.astype(mx.float32), None)
        assert MLXSampler(framework, Sampling(1.0, seed=5, **options)).draw(logits, None).tolist() == expected.tolist()


def test_gemma_in_float16_is_refused_on_torch(gemma3_folder: Path) -> None:
    """Its activations are beyond float16, and transformers' own answer is empty."""
    model = mlx_lqr.load(gemma3_folder, backend="torch", dtype="float16")
    with pytest.raises(OverflowingError, match=r"overflow float16 at layer \d+: load the model with dtype bfloat16"):
        mlx_lqr.generate(model, "The capital of France is", max_tokens=3, temperature=0)


def test_what_mlx_would_cut_or_cannot_compute_is_refused() -> None:
    with pytest.raises(InputError, match="Gemma 3 overflow float16, where mlx-lm cuts them: load it with bfloat16"):
        mlx_lqr.load(tiny_folder("gemma3_text"), backend="mlx", dtype="float16")
    for dtype in ("float16", "bfloat16"):
        with pytest.raises(InputError, match="experts in float32 alone: load it with dtype float32"):
            mlx_lqr.load(tiny_folder("mixtral"), backend="mlx", dtype=dtype)


@every_backend
def test_commands_and_tasks_end_with_that_line(backend: str) -> None:
    given = [
        str(folder_of("MLP")),
        "-p",
        "w5 w17",
        "-n",
        "3",
        "--dtype",
        "float16",
        "--backend",
        backend,
        "--seed",
        "1",
    ]
    done = CliRunner().invoke(main, ["generate", *given])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "overflow float16 at layer 1: load the model with dtype bfloat16 or float32" in done.stderr
    task = tasks.concept(["w5"], openings=["w5 w17"], damage=[NeutralText(["w5 w17 w3 w4 w5 w6"])])
    with pytest.raises(OverflowingError, match="overflow float16 at layer 1"):
        tasks.evaluate(model_of("MLP", backend, "float16"), task)


@every_backend
def test_a_law_that_goes_from_token_to_token_is_refused_too(backend: str) -> None:
    """Its scores come step by step, and only those that are asked for count."""
    model = model_of("head", backend, "float32")
    steering = mlx_lqr.fit_baseline(model, "spid", [[1, 2, 3], [4, 5]], [[6, 7], [8]], numbers={"kd": 0.1})
    law = law_of_steering(steering, 1e25)
    assert isinstance(law, CarryingLaw)
    pairs = [(PROMPT, [3, 4]), ([1], [2])]
    for work in (model.log_probabilities, model.logits_along):
        with pytest.raises(OverflowingError, match=r"overflow at layer \d at strength 1e\+25: lower the strength"):
            work(pairs, law=law)
        assert all(np.isfinite(scores).all() for scores in work(pairs, law=law_of_steering(steering, 1.0)))


@pytest.mark.parametrize("strength", [1.0, 1e25])
def test_mlx_lm_and_transformers_end_with_that_line_too(strength: float) -> None:
    """Around models that are steered in place, in their own loops."""
    mlx_lm_generate = importlib.import_module("mlx_lm.generate")
    ours = mlx_lqr.load(tiny_folder("llama"), backend="mlx", dtype="float32")
    theirs = mlx_lqr.load(tiny_folder("llama"), backend="torch", dtype="float32")
    controller = mlx_lqr.fit(ours, [[1, 2, 3], [4, 5]], [[6, 7], [8]], layers=[0], cost="feature")
    runs: list[Callable[[], Any]] = [
        lambda: list(mlx_lm_generate.generate_step(mx.array(PROMPT), ours.module, max_tokens=3)),  # type: ignore[attr-defined]
        lambda: next(mlx_lm_generate.generate_step(mx.array(PROMPT), ours.module, max_tokens=3)),  # type: ignore[attr-defined]
        lambda: theirs.module.generate(torch.tensor([PROMPT, PROMPT]), max_new_tokens=3),  # type: ignore[attr-defined]
    ]
    for model, run in zip((ours, ours, theirs), runs, strict=True):
        with mlx_lqr.steer(model, controller, strength):
            if strength == 1:
                run()
                continue
            with pytest.raises(OverflowingError, match="overflow at this strength"):
                run()
        run()  # nothing is left behind
