"""How texts are drawn where nobody says how: one default for all that writes, and what its exceptions are."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest
from helpers.backends import BACKENDS, tiny_on
from helpers.chance import allow_unseeded
from helpers.command_line import all_commands
from helpers.decoding import decoded
from helpers.prompts import BATCH, PROMPT
from helpers.tiny_tokenizers import chatting

import mlx_lqr
from mlx_lqr.backends.protocol import GREEDY, Model, Sampling
from mlx_lqr.runtime import Chat, Options
from mlx_lqr.runtime.__main__ import _parser
from mlx_lqr.tasks import Decoding
from mlx_lqr.tasks.registry import TASKS

DEFAULTS = {name: field.default for name, field in Sampling.__dataclass_fields__.items()}
WRITING = ["generate", "chat"]


@pytest.fixture
def by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_unseeded(monkeypatch)


def written(model: Model, **options: Any) -> list[int | None]:
    return [piece.token for piece in mlx_lqr.stream(model, PROMPT, max_tokens=20, **options)]


def test_the_default_is_the_one_that_users_of_other_programs_know() -> None:
    assert {name: value for name, value in DEFAULTS.items() if name != "seed"} == {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": None,
        "presence_penalty": 0.0,
    }
    assert GREEDY.temperature == 0


def test_what_is_drawn_has_a_frequency_penalty_and_the_likeliest_token_has_none() -> None:
    assert Sampling().frequency == Sampling(0.1, seed=3).frequency == 0.3
    assert GREEDY.frequency == 0
    for temperature in (0.0, 0.8):
        for given in (0.0, -0.5, 1.5):
            assert Sampling(temperature, frequency_penalty=given).frequency == given


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_nothing_is_said_the_default_penalty_is_taken_off_the_logits(backend: str) -> None:
    model = tiny_on(backend, "llama")

    def drawn(**options: Any) -> list[int | None]:
        return [piece.token for piece in mlx_lqr.stream(model, PROMPT, max_tokens=60, seed=3, **options)]

    assert drawn() == drawn(frequency_penalty=0.3) == drawn(frequency_penalty=None)
    assert drawn() != drawn(frequency_penalty=0.0)
    likeliest = drawn(temperature=0)
    assert likeliest == drawn(temperature=0, frequency_penalty=0.0)
    assert likeliest != drawn(temperature=0, frequency_penalty=0.3)


def test_every_command_and_task_has_the_same_default() -> None:
    """The exceptions are tasks whose metric is of the likeliest answer."""
    commands = {" ".join(path): command for path, command in all_commands()}
    for name in WRITING:
        assert {one.name: one.default for one in commands[name].params if one.name in DEFAULTS} == DEFAULTS
    own = Decoding()
    assert (own.temperature, own.top_p) == (DEFAULTS["temperature"], DEFAULTS["top_p"])
    assert own.frequency_penalty is None
    assert own.settings["frequency_penalty"] == Sampling().frequency
    for kind in TASKS.values():
        assert kind.decoding.temperature in (0.0, DEFAULTS["temperature"])
        assert kind.decoding.top_p == DEFAULTS["top_p"]
        assert kind.decoding.frequency_penalty is None
        for group in ("eval", "compare", "tune"):
            shown = {one.name: one.default for one in commands[f"{group} {kind.name}"].params}
            assert (shown["temperature"], shown["top_p"]) == (kind.decoding.temperature, kind.decoding.top_p)
            assert shown["frequency_penalty"] is None


def test_the_light_runtime_passes_on_what_is_given_and_says_the_default() -> None:
    actions = {action.dest: action for action in _parser()._actions}
    for name, default in DEFAULTS.items():
        assert actions[name].default is argparse.SUPPRESS
        assert default is None or f"[default: {default}]" in str(actions[name].help)
    assert not DEFAULTS.keys() & vars(_parser().parse_args(["demo"])).keys()


def test_the_options_of_python_are_those_of_sampling() -> None:
    assert DEFAULTS.keys() <= Options.__annotations__.keys()


@pytest.mark.parametrize("backend", BACKENDS)
def test_python_draws_with_the_default(backend: str) -> None:
    model = tiny_on(backend, "llama")
    assert written(model, seed=3) == decoded(model, PROMPT, sampling=Sampling(0.8, 0.9, seed=3), max_tokens=20)
    assert written(model, seed=3) != written(model, seed=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_0_is_the_likeliest_token_whatever_else_is_asked_for(backend: str, by_chance: None) -> None:
    model = tiny_on(backend, "llama")
    likeliest = list(PROMPT)
    for _ in range(8):
        likeliest.append(int(np.argmax(model.logits(likeliest))))
    for others in ({}, {"top_p": 0.5, "top_k": 3, "min_p": 0.2}, {"top_p": 1.0, "seed": 2}):
        options: Options = {"max_tokens": 8, "temperature": 0, **others}  # type: ignore[typeddict-item]
        assert [piece.token for piece in mlx_lqr.stream(model, PROMPT, **options)] == likeliest[len(PROMPT) :]


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_seed_every_call_draws_anew(backend: str, by_chance: None) -> None:
    """Ten tokens of 64 that are about equally likely: two answers agree once in 64**10 / 2 calls."""
    model = tiny_on(backend, "llama")
    options: Options = {"temperature": 100.0, "top_p": 1.0, "max_tokens": 10}
    pairs = [(piece.token for _, piece in mlx_lqr.batch_stream(model, [PROMPT, PROMPT], **options)) for _ in range(2)]
    one, other = (list(tokens) for tokens in pairs)
    assert one != other
    assert one[0::2] != one[1::2]  # nor do the prompts of a batch share their draws


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_with_the_default_is_each_prompt_alone(backend: str) -> None:
    model = tiny_on(backend, "gemma3_text")
    options: Options = {"max_tokens": 8}
    together: list[list[int | None]] = [[] for _ in BATCH]
    for i, piece in mlx_lqr.batch_stream(model, BATCH, seed=5, **options):
        together[i].append(piece.token)
    for i, prompt in enumerate(BATCH):
        assert [piece.token for piece in mlx_lqr.stream(model, prompt, seed=5 + i, **options)] == together[i]


def test_an_answer_is_compared_with_one_of_the_same_draws(by_chance: None) -> None:
    """So that what differs is the steering's doing; the next answer is drawn anew, unless there is a seed."""
    hot: Options = {"max_tokens": 8, "temperature": 100.0, "top_p": 1.0}
    chat = Chat(chatting(), options=hot)
    answers = []
    for _ in range(2):
        answers.append([piece.token for piece in chat.answer("hello")])
        again = [[piece.token for piece in chat.unsteered()] for _ in range(2)]
        assert again == [answers[-1]] * 2
        chat.restart()
    assert answers[0] != answers[1]
    seeded = Chat(chatting(), options={**hot, "seed": 7})
    first = [piece.token for piece in seeded.answer("hello")]
    seeded.restart()
    assert [piece.token for piece in seeded.answer("hello")] == first
