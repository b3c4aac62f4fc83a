"""What is said of two sets of prompts that differ in more than the concept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mlx_lqr
from mlx_lqr import review_prompts, review_separation
from mlx_lqr.backends.protocol import Model


class Words:
    """A tokenizer of words and signs, with a chat template of one mark."""

    has_chat_template = True

    def __init__(self) -> None:
        self.known: list[str] = []

    def encode(self, text: str) -> list[int]:
        pieces = text.replace(".", " .").replace("?", " ?").split()
        self.known += [piece for piece in pieces if piece not in self.known]
        return [self.known.index(piece) for piece in pieces]

    def decode(self, tokens: list[int], *, skip_special_tokens: bool = True) -> str:
        return " ".join(self.known[token] for token in tokens)

    def chat_text(self, messages: list[dict[str, str]]) -> str:
        return "".join(f"<s> <user> {message['content']} <end>" for message in messages)


@pytest.fixture
def model() -> Any:
    return SimpleNamespace(tokenizer=Words(), vocab_size=10_000, context_length=100)


NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
PLAIN = [f"The {a} men saw {b} hills and went home." for a, b in zip(NUMBERS, reversed(NUMBERS), strict=True)]
OTHER = [f"My {a} cats ate {b} fish and fell asleep." for a, b in zip(NUMBERS, reversed(NUMBERS), strict=True)]


def test_sets_alike_in_all_but_the_concept_pass(model: Any) -> None:
    assert review_prompts(model, PLAIN, OTHER) == []
    assert review_prompts(model, [model.tokenizer.encode(text) for text in PLAIN], OTHER) == []


@pytest.mark.parametrize(
    ("positive", "says"),
    [
        (PLAIN[:7], "7 positive and 10 negative prompts are few"),
        ([f"Long ago and far away, said he, {text}" for text in PLAIN],
         "the positive prompts are longer, 17 tokens on average against 10, so"),
        ([text[:-1] for text in PLAIN], "100% of the positive prompts end without . ! or ? and 0% of the negative"),
        ([text[:-1] + "?" for text in PLAIN[:3]] + PLAIN[3:], "30% of the positive prompts are questions and 0%"),
        ([text.lower() for text in PLAIN[:3]] + PLAIN[3:], "30% of the positive prompts begin with a small letter"),
        ([f"<user> {text}" for text in PLAIN[:3]] + PLAIN[3:],
         "30% of the positive prompts are in the chat template (<user>) and 0% of the negative"),
        ([*PLAIN[:8], PLAIN[0].upper(), PLAIN[1].replace("men", "women")],
         "2 of the 10 positive and 0 of the 10 negative prompts repeat another"),
        ([*PLAIN[:9], OTHER[3].lower()], "prompts that stand in both sets add nothing to the direction"),
    ],
)  # fmt: skip
def test_one_thing_that_differs_is_one_sentence(model: Any, positive: list[str], says: str) -> None:
    (finding,) = review_prompts(model, positive, OTHER)
    assert finding.startswith(says)


def test_a_last_token_of_one_set_alone_is_named(model: Any) -> None:
    positive = [f"{text[:-1]} dog" for text in PLAIN]
    negative = [f"{text[:-1]} {number}" for text, number in zip(OTHER, NUMBERS, strict=True)]
    (finding,) = review_prompts(model, positive, negative)
    assert finding.startswith("100% of the positive prompts end in the token 'dog' and 0% of the negative")


def test_bundled_sets_pass(smollm2: Model) -> None:
    found = {name: review_prompts(smollm2, *mlx_lqr.bundled_prompts(name)) for name in mlx_lqr.bundled_concepts()}
    assert not {name: findings for name, findings in found.items() if findings}


def test_a_direction_that_means_nothing_is_reported() -> None:
    zeros = np.zeros((4, 3), np.float32)
    held_out = np.array([0, 0.3, 0.2, 0.79, 2.0], np.float32)
    contrast = mlx_lqr.Contrast(zeros, zeros, zeros, zeros[0], (9, 9), held_out=held_out)
    finding = review_separation(contrast, [0, 2])  # their inputs and outputs: 0, 1, 2 and 3
    assert finding is not None
    assert "0.8 standard deviations at best" in finding
    assert review_separation(contrast, [0, 3]) is None
    assert review_separation(contrast, []) is None
    assert review_separation(mlx_lqr.Contrast(zeros, zeros, zeros, zeros[0], (1, 1)), [0]) is None
