"""What prompts have in common is read once: their common beginning, prompts that begin others, and unsteered blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.backends import BACKENDS, tiny_on
from helpers.controllers import NEGATIVE, POSITIVE, law_for

import mlx_lqr
from mlx_lqr.backends import batching
from mlx_lqr.backends.mlx.decoder import MLXDecoder
from mlx_lqr.backends.protocol import Kept
from mlx_lqr.methods.alqr import LinearFeedback

BEGINNING = [3, 9, 27, 17, 51, 25, 11, 33, 35, 41]
"""Longer than the sliding windows of the tiny models, and than what it pays to read once."""
PROMPTS = [
    [*BEGINNING, 1, 2, 3, 4],
    [*BEGINNING, 1, 2],
    [*BEGINNING, 7],
    [*BEGINNING, 7, 5, 6],
    [*BEGINNING, 1, 2, 3, 4],
    [*BEGINNING, 8, 60, 7, 1, 2],
]
QUESTIONS = [[*range(20, 30), 12], [*range(40, 50), 13]], [[*range(30, 42), 14]]  # of one length, and a longer one
ASKED = [[*BEGINNING, *question, i, *range(i)] for group in QUESTIONS for question in group for i in (2, 4, 3)]
"""Three prompts to each question: after what all begin with, those with one question have more in common."""
families = pytest.mark.parametrize("family", ["gemma3_text", "llama", "qwen3_moe"])  # sliding windows, none, experts
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def law_at(model: Any, layers: tuple[int, ...], strength: float) -> LinearFeedback:
    controller = mlx_lqr.fit(model, POSITIVE, NEGATIVE, layers=layers, jacobian_prompts=1)
    return LinearFeedback(controller, strength)


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every sequence is read from its first token to its last."""
    monkeypatch.setattr(batching, "LEAST_SHARED", 10**9)


def positions_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each pass runs, from now on."""
    read: list[int] = []
    padded = batching.padded

    def counting(prompts: Any) -> Any:
        read.append(len(prompts) * max(map(len, prompts)))
        return padded(prompts)

    monkeypatch.setattr("mlx_lqr.backends.hooked_model.padded", counting)
    return read


@every_backend
@families
@pytest.mark.parametrize("steering", ["none", "last", "all"])
@pytest.mark.parametrize("prompts", [PROMPTS, [*ASKED, *PROMPTS]], ids=["alike", "questions"])
def test_residuals_are_those_of_prompts_read_alone(
    backend: str, family: str, steering: str, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_on(backend, family)
    options: dict[str, Any] = {} if steering == "none" else {"law": law_for(model), "steer_all": steering == "all"}
    together = model.residuals(prompts, **options)
    alone(monkeypatch)
    expected = np.stack([model.residuals([prompt], **options)[0] for prompt in prompts])
    assert np.abs(together - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_are_those_of_prompts_read_alone(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_on(backend, "gemma3_text")
    together = model.head_outputs(PROMPTS)
    alone(monkeypatch)
    expected = np.stack([model.head_outputs([prompt])[0] for prompt in PROMPTS])
    assert np.abs(together - expected).max() < 1e-5 * np.abs(expected).max()


def test_nothing_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_on("mlx", "llama")
    law, read = law_for(model), positions_read(monkeypatch)
    model.residuals(PROMPTS)
    assert read == [3 * 5]  # three prompts begin or are another, and all begin alike
    read.clear()
    model.residuals(PROMPTS, law=law)  # which acts at another position of each
    assert read == [6 * 5]


def beginnings_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many beginnings of sequences are asked for, and of which length, from now on."""
    beginnings: list[tuple[int, int]] = []
    call = type(model)._past

    def past(self: Any, own: Any, *args: Any) -> Any:
        beginnings.append((len(own), len(own[0])))
        return call(self, own, *args)

    monkeypatch.setattr(type(model), "_past", past)
    return beginnings


def test_what_prompts_to_one_question_have_in_common_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_on("mlx", "llama")
    monkeypatch.setattr(batching, "PASS", 5)
    read, beginnings = positions_read(monkeypatch), beginnings_read(model, monkeypatch)
    model.residuals(ASKED)
    assert read == [6 * 5, 3 * 5]
    # Two questions, after what both begin with; then the longer one.
    assert beginnings == [(2, 21), (1, 10), (1, 23)]


def test_a_few_tokens_are_read_again_where_that_saves_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_on("mlx", "llama")
    monkeypatch.setattr(batching, "PASS", 14)  # three prompts, whose beginning is two tokens longer
    read, beginnings = positions_read(monkeypatch), beginnings_read(model, monkeypatch)
    model.residuals(ASKED)
    assert read == [9 * 7]
    assert beginnings == [(3, 21), (1, 10)]


def test_sequences_that_are_much_longer_are_a_pass_of_their_own() -> None:
    lengths = [10, 40, 11, 38, 12, 10]
    assert list(batching.batches(lengths)) == [[1, 3], [4, 2, 0, 5]]
    assert list(batching.batches([40, *[39] * 9])) == [[*range(10)]]  # nine tokens of padding
    assert list(batching.batches(lengths, 80, most=3)) == [[1, 3], [4, 2, 0], [5]]
    assert list(batching.batches(lengths, 30)) == [[1], [3], [4, 2], [0, 5]]
    assert list(batching.batches(lengths, 500, pads=False)) == [[1, 3, 4, 2, 0, 5]]  # as llama.cpp reads them


def test_the_beginnings_of_several_passes_are_read_in_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_on("mlx", "llama")
    read: list[int] = []
    call = type(model)._read

    def reading(self: Any, tokens: Any, caches: Any) -> Any:
        read.append(sum(map(len, tokens)))
        return call(self, tokens, caches)

    monkeypatch.setattr(type(model), "_read", reading)
    monkeypatch.setattr(batching.batches, "__defaults__", (12,))
    passes = positions_read(monkeypatch)
    found = model.residuals(ASKED)
    assert len(passes) > 3
    assert read == [10, 3 * 11]
    read.clear()
    monkeypatch.setattr(batching, "BATCH_TOKENS", 12)  # for which these are too many
    assert np.abs(model.residuals(ASKED) - found).max() < 1e-5 * np.abs(found).max()
    assert sum(read) > 10 + 3 * 11


def test_a_long_common_beginning_is_kept_for_few_sequences() -> None:
    prompts = [[*range(1000), i] for i in range(30)]
    rows: list[int] = []

    def of_batch(asked: batching.Reading) -> np.ndarray:
        assert asked.shared == 1000
        rows.append(len(asked.sequences))
        return np.array([prompt[-1] for prompt in asked.prompts], np.float32)

    found = batching.in_batches(prompts, of_batch, None, shares=True)
    assert found.tolist() == list(range(30))
    assert max(rows) * 1001 <= batching.BATCH_TOKENS * batching.KEPT


@every_backend
@pytest.mark.parametrize("family", ["gemma3_text", "llama", "qwen3"])
def test_traces_are_those_of_prompts_traced_alone(backend: str, family: str) -> None:
    model = tiny_on(backend, family)
    prompts = [BEGINNING, *PROMPTS, [7], [8, 9], PROMPTS[0]]
    traces = list(model.traces(prompts))
    for trace, prompt in zip(traces, prompts, strict=True):
        alone = model.trace(prompt)
        assert np.abs(trace.residual - alone.residual).max() < 1e-5 * np.abs(alone.residual).max()
        for k in range(model.num_layers):
            A = model.jacobian(alone, k)
            assert np.abs(model.jacobian(trace, k) - A).max() < 1e-4 * np.abs(A).max()


def test_what_a_prompt_begins_with_as_the_one_before_is_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_on("mlx", "llama")
    read: list[int] = []
    fill = MLXDecoder._fill

    def filling(self: Any, prompts: Any, **options: Any) -> None:
        read.append(len(prompts[0]))
        fill(self, prompts, **options)

    monkeypatch.setattr(MLXDecoder, "_fill", filling)
    list(model.traces([PROMPTS[0], PROMPTS[1], [1, 2, 3], PROMPTS[2]]))
    assert read == [14, 1, 3, 11]  # the second but for its last token is what the first begins with


@every_backend
@families
@pytest.mark.parametrize("steer_all", [False, True])
def test_logits_do_not_depend_on_what_is_kept(
    backend: str, family: str, steer_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_on(backend, family)
    kept = Kept(1)
    pairs = [(prompt[: len(BEGINNING) + 1], prompt[len(BEGINNING) + 1 :]) for prompt in PROMPTS]
    laws: list[Any] = [law_at(model, (1, 2), strength) for strength in (1.0, 3.0)]
    with_kept = [model.logits_along(pairs, law=law, steer_all=steer_all, kept=kept) for law in laws]
    assert kept.inputs
    laws += [law_at(model, (0,), 1.0), None]  # before what is kept, and nowhere
    with_kept += [
        model.logits_along(pairs, law=law, steer_all=steer_all and law is not None, kept=kept) for law in laws[2:]
    ]
    alone(monkeypatch)
    for law, logits in zip(laws, with_kept, strict=True):
        expected = model.logits_along(pairs, law=law, steer_all=steer_all and law is not None)
        assert max(np.abs(one - other).max() for one, other in zip(logits, expected, strict=True)) < 1e-4


def test_blocks_before_the_first_steered_one_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_on("mlx", "llama")
    kept = Kept(2)
    pairs = [(prompt[:-1], prompt[-1:]) for prompt in PROMPTS]
    laws = [law_at(model, (2,), strength) for strength in (1.0, 2.0)]
    run: list[Any] = []
    block = type(model.blocks[0])
    called = block.__call__

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        run.append(self)
        return called(self, *args, **kwargs)

    monkeypatch.setattr(block, "__call__", counting)
    monkeypatch.setattr(type(model), "_shares", False)
    for law in laws:
        model.logits_along(pairs, law=law, kept=kept)
    assert len(run) == model.num_layers + 1


def test_what_the_passes_of_a_call_begin_with_is_read_in_the_first_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_on("mlx", "llama")
    monkeypatch.setattr(batching, "BATCH_TOKENS", 1)
    monkeypatch.setattr(batching.batches, "__defaults__", (1,))  # a pass for each sequence
    longer = [[*own[:-1], *range(20, 30), *own[-1:]] for own in PROMPTS[:2]]
    prompts = [*PROMPTS, *longer]
    run: list[int] = []
    block = type(model.blocks[0])
    called = block.__call__

    def counting(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        run.append(x.shape[0] * x.shape[1])
        return called(self, x, *args, **kwargs)

    monkeypatch.setattr(block, "__call__", counting)
    found = model.residuals(prompts)
    at_first = run[:: model.num_layers]
    assert sum(at_first) < 2 * len(BEGINNING) + sum(len(prompt) - len(BEGINNING) for prompt in prompts)
    alone(monkeypatch)
    expected = np.stack([model.residuals([prompt])[0] for prompt in prompts])
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
