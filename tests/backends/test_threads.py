"""Several threads: each gets what it would get alone, or a line that says why not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import pytest
from helpers.backends import tiny_folder, tiny_on
from helpers.controllers import NEGATIVE, POSITIVE, controller_for
from helpers.decoding import tokens

import mlx_lqr
from mlx_lqr import InputError, Options
from mlx_lqr.backends.protocol import Model

backends = pytest.mark.parametrize("backend", ["mlx", "torch"])
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [11, 3, 5], [20, 21, 22, 23], [7, 9, 60, 4, 2, 30, 31, 32]]
LONG = 40
"""Tokens after which MLX has compiled its steps"""


class Silent:
    """A tokenizer that ends nothing and says nothing."""

    end_tokens: frozenset[int] = frozenset()

    def stream(self, prompt: Sequence[int] = ()) -> Silent:
        return self

    def add(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def model_on(backend: str, family: str = "llama", seed: int = 0) -> Model:
    """Untied, or a llama this small says one token again and again, and that would hide much."""
    changes = {"tie_word_embeddings": False} if family == "llama" else {}
    model: Any = tiny_on(backend, family, seed=seed, **changes)
    model._tokenizer = Silent()
    return model


def together(*work: Callable[[], Any]) -> list[Any]:
    """What each function returns or raises, all of them begun at one moment, each in a thread of its own."""
    start = threading.Barrier(len(work))

    def run(function: Callable[[], Any]) -> Any:
        start.wait()
        try:
            return function()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(run, work))


@backends
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_threads_get_the_tokens_that_each_gets_alone(backend: str, family: str) -> None:
    models = [model_on(backend, family), model_on(backend, family, seed=1)]
    steered: list[Options] = [{"controller": controller_for(model), "strength": 2.0} for model in models]
    settings: list[Options] = [
        {**steered[0], "max_tokens": 9, "temperature": 0},
        {**steered[1], "max_tokens": LONG, "temperature": 0},
        {"max_tokens": 9, "temperature": 1.0, "seed": 3},
        {**steered[1], "max_tokens": 9, "temperature": 0},
    ]
    for chosen in ([0, 0, 0, 0], [0, 1, 0, 1]):
        if chosen[1] == 0:
            settings[1], settings[3] = {**settings[1], **steered[0]}, {"max_tokens": 12, "temperature": 0}
        else:
            settings[1], settings[3] = {**settings[1], **steered[1]}, {**settings[3], **steered[1]}

        def answer(i: int, chosen: list[int] = chosen) -> Callable[[], list[int | None]]:
            return lambda: tokens(mlx_lqr.stream(models[chosen[i]], PROMPTS[i], **settings[i]))

        alone = [answer(i)() for i in range(4)]
        for _ in range(3):
            assert together(*map(answer, range(4))) == alone


@backends
def test_an_answer_goes_on_in_another_thread(backend: str) -> None:
    model = model_on(backend)
    options: Options = {"controller": controller_for(model), "max_tokens": LONG, "temperature": 1.0, "seed": 3}
    options |= {"repetition_penalty": 1.1}
    expected = tokens(mlx_lqr.stream(model, PROMPTS[0], **options))
    pieces = mlx_lqr.stream(model, PROMPTS[0], **options)
    answer: list[int | None] = []
    for count in (1, 3, 33, None):  # each time by a thread that is new
        with ThreadPoolExecutor(1) as pool:
            answer += pool.submit(lambda count=count: tokens(islice(pieces, count))).result()
    assert answer == expected


@backends
def test_one_thread_may_take_from_two_answers_in_turn_while_another_decodes(backend: str) -> None:
    model = model_on(backend)
    options: Options = {"controller": controller_for(model), "max_tokens": 9, "temperature": 0}
    alone = [tokens(mlx_lqr.stream(model, prompt, **options)) for prompt in PROMPTS]

    def in_turn() -> list[list[int | None]]:
        streams = [mlx_lqr.stream(model, prompt, **options) for prompt in PROMPTS[:2]]
        return [list(both) for both in zip(*[(a.token, b.token) for a, b in zip(*streams, strict=True)], strict=True)]

    pairs, other = together(in_turn, lambda: tokens(mlx_lqr.stream(model, PROMPTS[2], **options)))
    assert pairs == alone[:2]
    assert other == alone[2]


@backends
def test_a_model_is_recorded_and_fitted_while_it_decodes(backend: str) -> None:
    model = model_on(backend)
    controller = controller_for(model)
    options: Options = {"controller": controller, "max_tokens": 20, "temperature": 0}
    expected = tokens(mlx_lqr.stream(model, PROMPTS[0], **options))
    contrast = mlx_lqr.contrast(model, POSITIVE, NEGATIVE)
    answer, fitted, recorded, scores = together(
        lambda: tokens(mlx_lqr.stream(model, PROMPTS[0], **options)),
        lambda: controller_for(model),
        lambda: mlx_lqr.contrast(model, POSITIVE, NEGATIVE),
        lambda: model.log_probabilities([(PROMPTS[1], PROMPTS[2])]),
    )
    assert answer == expected
    assert np.allclose(fitted.gain, controller.gain, rtol=1e-5, atol=1e-7)
    assert np.array_equal(recorded.direction, contrast.direction)
    assert np.array_equal(scores[0], model.log_probabilities([(PROMPTS[1], PROMPTS[2])])[0])


@backends
def test_steering_in_place_refuses_what_other_threads_decode(backend: str) -> None:
    """And what this thread began before. No token comes that another controller steered."""
    model = model_on(backend)
    controller = controller_for(model)
    expected = tokens(mlx_lqr.stream(model, PROMPTS[0], max_tokens=LONG, temperature=0))
    pieces: Iterator[mlx_lqr.Piece] = mlx_lqr.stream(model, PROMPTS[0], max_tokens=LONG, temperature=0)
    answer = tokens(islice(pieces, 2))
    with mlx_lqr.steer(model, controller, 5.0), ThreadPoolExecutor(1) as pool:
        for refused in (
            lambda: next(pieces),
            lambda: mlx_lqr.stream(model, PROMPTS[0], max_tokens=9, temperature=0),
            lambda: model.log_probabilities([(PROMPTS[1], PROMPTS[2])]),
            lambda: model.residuals(PROMPTS),
        ):
            with pytest.raises(InputError, match="being steered"):
                pool.submit(refused).result()
    assert answer == expected[:2]
    assert tokens(mlx_lqr.stream(model, PROMPTS[0], max_tokens=LONG, temperature=0)) == expected

    def steer() -> None:
        for _ in range(5):
            with mlx_lqr.steer(model, controller, 5.0):
                pass

    decoded, steered = together(
        lambda: tokens(mlx_lqr.stream(model, PROMPTS[0], max_tokens=LONG, temperature=0)), steer
    )
    assert steered is None
    assert decoded == expected or (isinstance(decoded, InputError) and "being steered" in str(decoded))


@backends
def test_calls_of_another_thread_are_not_steered_by_an_answer(backend: str) -> None:
    """Those of the framework's own model, while a decode stands in it: as they are alone, or refused."""
    model: Any = model_on(backend)
    seen: list[Any] = []

    def own_call() -> np.ndarray:
        if backend == "mlx":
            import mlx.core as mx

            return np.asarray(model.module(mx.array([PROMPTS[0]])))
        import torch

        with torch.no_grad():
            return np.asarray(model.module(torch.tensor([PROMPTS[0]])).logits)

    def try_own_call() -> Any:
        try:
            return own_call()
        except InputError as refusal:
            return refusal

    class Law:
        layers, site, replayable, acts = range(3), "block", False, True

        def to(self, *_: Any, **__: Any) -> Law:
            return self

        def aim(self) -> None: ...

        def __call__(self, layer: int, z: Any, output: Any) -> Any:
            with ThreadPoolExecutor(1) as pool:
                seen.append(pool.submit(try_own_call).result())
            return output * 2

    expected = own_call()
    model.decoder(Law()).step([5])
    assert len(seen) == 3
    for one in seen:
        if isinstance(one, InputError):
            assert "another thread" in str(one)
        else:
            assert np.array_equal(one, expected)
    assert np.array_equal(own_call(), expected)


@backends
def test_models_are_loaded_side_by_side(backend: str) -> None:
    folders = [tiny_folder("llama", seed=seed) for seed in (5, 6)]

    def loaded(i: int) -> np.ndarray:
        return mlx_lqr.load(folders[i], backend=backend).logits(PROMPTS[0])  # type: ignore[arg-type]

    expected = [loaded(i) for i in range(2)]
    first, second = together(lambda: loaded(0), lambda: loaded(1))
    assert np.array_equal(first, expected[0])
    assert np.array_equal(second, expected[1])
