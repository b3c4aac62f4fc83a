"""Damage: what steering changes on neutral text, and on questions with one right answer.

KL: neutral sentences are read token by token, steered as if the model had written them. At each position after the
first few, KL(steered || unsteered) of the next token in nats (metrics.py); the metric is its mean. 0 is no change.
Capability: multiple choice by log-probability. The answer with the highest total log-probability after the question
counts as the model's; chance is one over the number of answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np

from mlx_lqr.backends.protocol import Runner
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.divergence import kl_divergence
from mlx_lqr.lqr.prompts import tokenise
from mlx_lqr.tasks.bootstrap import Metric, mean
from mlx_lqr.tasks.read import bundled_lines, read_rows
from mlx_lqr.tasks.records import Row, digest
from mlx_lqr.tasks.steering import Steered

PREFIX = 4
"""Tokens of a sentence before the first position that is measured."""
POSITIONS = 12
"""Measured positions of a sentence, at most."""


@dataclass(frozen=True, eq=False)
class NeutralText:
    """The part: how far next-token distributions on neutral sentences move."""

    sentences: Sequence[str] = ()
    """By default the bundled ones"""
    name: str = "neutral text"

    def __len__(self) -> int:
        return len(self._sentences)

    def settings(self, model: Runner) -> Row:
        return {"sentences": digest(list(self._sentences)), "prefix": PREFIX, "positions": POSITIONS}

    def rows(self, steered: Steered, indices: range) -> list[Row]:
        sentences = [self._sentences[i] for i in indices]
        tokens = [tokenise(steered.model, sentence)[: PREFIX + POSITIONS] for sentence in sentences]
        for sentence, own in zip(sentences, tokens, strict=True):
            if len(own) <= PREFIX:
                raise InputError(f"a neutral sentence needs more than {PREFIX} tokens: {sentence!r}")
        divergences = [np.zeros(len(own) - PREFIX) for own in tokens]
        if steered.law is not None:
            pairs = [(own[: PREFIX + 1], own[PREFIX + 1 :]) for own in tokens]  # the first steered position is PREFIX
            both = zip(steered.logits_along(pairs), steered.unsteered.logits_along(pairs), strict=True)
            divergences = [kl_divergence(logits, reference) for logits, reference in both]
        return [
            {"sentence": sentence, "kl": float(divergence.mean()), "positions": len(divergence)}
            for sentence, divergence in zip(sentences, divergences, strict=True)
        ]

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        sums = np.array([(row["kl"] * row["positions"], row["positions"]) for row in rows], np.float64)
        return {"kl": Metric(sums, np.array([row["index"] for row in rows], np.int64))}

    @property
    def _sentences(self) -> Sequence[str]:
        return self.sentences or bundled_lines("neutral.txt")


@dataclass(frozen=True)
class Question:
    """A text to complete, the right completion, and wrong ones."""

    prompt: str
    answer: str
    others: tuple[str, ...]

    @property
    def answers(self) -> tuple[str, ...]:
        return (self.answer, *self.others)


@dataclass(frozen=True, eq=False)
class Capability:
    """The part: questions with one right answer among several."""

    questions: Sequence[Question]
    name: str = "capability"

    @classmethod
    def bundled(cls) -> Capability:
        """The bundled questions: sums, facts and grammar, which small models get partly right."""
        return cls([_question(json.loads(line)) for line in bundled_lines("capability.jsonl")])

    @classmethod
    def read(cls, path: str | PathLike[str], limit: int | None = None) -> Capability:
        """JSON lines with the keys prompt, answer and others (a list).

        Raises:
            InputError: the file is missing or not of this form.
        """
        return cls(
            [_question(row) for row in read_rows(path, {"prompt": "text", "answer": "text", "others": "texts"}, limit)]
        )

    def __len__(self) -> int:
        return len(self.questions)

    def settings(self, model: Runner) -> Row:
        return {"questions": digest([(one.prompt, one.answer, one.others) for one in self.questions])}

    def rows(self, steered: Steered, indices: range) -> list[Row]:
        asked = [self.questions[i] for i in indices]
        scores = steered.scores([(one.prompt, one.answers) for one in asked])
        return [self._row(question, own) for question, own in zip(asked, scores, strict=True)]

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        groups = [row["index"] for row in rows]
        return {"capability": mean([row["correct"] for row in rows], groups, share=True)}

    @staticmethod
    def _row(question: Question, scores: list[float]) -> Row:
        given = int(np.argmax(scores))
        answer = question.answers[given]
        return {"prompt": question.prompt, "given": answer, "correct": given == 0, "log_probability": scores}


def _question(row: Row) -> Question:
    return Question(row["prompt"], row["answer"], tuple(row["others"]))
