"""What steering costs where it has no business: on neutral text, and on questions with one right answer.

KL: neutral sentences are read token by token, steered as if the model had written them; at each position after the
first few the mean of KL(steered || unsteered) over next tokens, in nats (metrics.py). 0 is no change at all.
Capability: multiple choice by log-probability. The answer whose text has the highest total log-probability after the
question counts as given; chance is one over the number of answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np

from mlx_lqr.backends.base import Model
from mlx_lqr.contrast import tokenise
from mlx_lqr.errors import InputError, OverflowingError
from mlx_lqr.tasks.bootstrap import Metric, mean
from mlx_lqr.tasks.metrics import kl_divergence
from mlx_lqr.tasks.read import bundled_text, read_rows
from mlx_lqr.tasks.records import Row
from mlx_lqr.tasks.run import digest
from mlx_lqr.tasks.steering import Steered

PREFIX = 4
"""Tokens of a sentence that come before the first position that counts."""
POSITIONS = 12
"""Positions of each sentence that count, at most."""


@dataclass(frozen=True, eq=False)
class NeutralText:
    """The part: how far next-token distributions on neutral sentences move."""

    sentences: Sequence[str] = ()
    """By default those that come with the library"""
    name: str = "neutral text"

    def __len__(self) -> int:
        return len(self._sentences)

    def settings(self, model: Model) -> Row:
        return {"sentences": digest(list(self._sentences)), "prefix": PREFIX, "positions": POSITIONS}

    def rows(self, steered: Steered, indices: range) -> list[Row]:
        sentences = [self._sentences[i] for i in indices]
        tokens = [tokenise(steered.model, sentence)[: PREFIX + POSITIONS] for sentence in sentences]
        for sentence, own in zip(sentences, tokens, strict=True):
            if len(own) <= PREFIX:
                raise InputError(f"a neutral sentence needs more than {PREFIX} tokens: {sentence!r}")
        counts = [len(own) - PREFIX for own in tokens]
        divergence = np.zeros((max(counts), len(tokens)))
        if steered.law is not None:
            pairs = zip(_next_logits(steered, tokens), _next_logits(steered.unsteered, tokens), strict=True)
            for position, (logits, reference) in enumerate(pairs):
                divergence[position] = kl_divergence(logits, reference)
        rows = []
        for i, (sentence, count) in enumerate(zip(sentences, counts, strict=True)):
            if not np.all(np.isfinite(divergence[:count, i])):
                raise OverflowingError(f"the activations overflow at strength {steered.strength:g}: lower the strength")
            rows.append({"sentence": sentence, "kl": float(divergence[:count, i].mean()), "positions": count})
        return rows

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        sums = np.array([(row["kl"] * row["positions"], row["positions"]) for row in rows], np.float64)
        return {"kl": Metric(sums, np.array([row["index"] for row in rows], np.int64))}

    @property
    def _sentences(self) -> Sequence[str]:
        return self.sentences or bundled_text("neutral.txt").splitlines()


def _next_logits(steered: Steered, tokens: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """Logits (B, V) after the tokens at PREFIX, then after each following position, in float64, of B sentences side by
    side; what comes beyond a sentence's end says nothing. The first steered position is PREFIX."""
    decoder = steered.decoder()
    decoder.fill([own[:PREFIX] for own in tokens], steered=steered.steer_all)
    for position in range(PREFIX, max(len(own) for own in tokens)):
        following = [own[position] if position < len(own) else own[-1] for own in tokens]
        yield np.array(decoder.step(following).tolist(), np.float64)


@dataclass(frozen=True)
class Question:
    """A text to complete, the right completion, and wrong ones."""

    prompt: str
    answer: str
    others: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Capability:
    """The part: questions with one right answer among several."""

    questions: Sequence[Question]
    name: str = "capability"

    @classmethod
    def bundled(cls) -> Capability:
        """Sums, facts and grammar that small models get partly right."""
        return cls([_question(json.loads(line)) for line in bundled_text("capability.jsonl").splitlines()])

    @classmethod
    def read(cls, path: str | PathLike[str], limit: int | None = None) -> Capability:
        """JSON lines with the keys prompt, answer and others (a list).

        Raises:
            InputError: a file that is missing or not of this form.
        """
        return cls(
            [_question(row) for row in read_rows(path, {"prompt": "text", "answer": "text", "others": "texts"}, limit)]
        )

    def __len__(self) -> int:
        return len(self.questions)

    def settings(self, model: Model) -> Row:
        return {"questions": digest([(one.prompt, one.answer, one.others) for one in self.questions])}

    def rows(self, steered: Steered, indices: range) -> list[Row]:
        return [self._row(steered, self.questions[i]) for i in indices]

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        groups = [row["index"] for row in rows]
        return {"capability": mean([row["correct"] for row in rows], groups, share=True)}

    def _row(self, steered: Steered, question: Question) -> Row:
        answers = (question.answer, *question.others)
        scores = [float(steered.log_probability(question.prompt, f" {answer}").sum()) for answer in answers]
        if not np.all(np.isfinite(scores)):
            raise OverflowingError(f"the activations overflow at strength {steered.strength:g}: lower the strength")
        given = int(np.argmax(scores))
        return {"prompt": question.prompt, "given": answers[given], "correct": given == 0, "log_probability": scores}


def _question(row: Row) -> Question:
    return Question(row["prompt"], row["answer"], tuple(row["others"]))
