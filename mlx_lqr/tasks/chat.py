"""Chat: what steering does to answers, and what it leaves of them.

Open questions, which could be answered in many ways, go through the chat template; `prevalence` is the share of answers
that mention the concept (concept.py). Factual questions have one short answer that even small models mostly know;
`accuracy` is the share of answers that have it in them, as whole words in any case. Both kinds were written for this
project and split before anything was measured: rows to fit on, rows to tune on, and rows to report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mlx_lqr.backends.protocol import Runner
from mlx_lqr.errors import InputError
from mlx_lqr.tasks.bootstrap import Metric, mean
from mlx_lqr.tasks.concept import WordFamily, words_of
from mlx_lqr.tasks.generations import Decoding, Generations, Judge
from mlx_lqr.tasks.kind import Purpose, TaskKind, TaskOption, TaskSettings
from mlx_lqr.tasks.read import bundled_lines, read_rows, spread
from mlx_lqr.tasks.records import Row, digest
from mlx_lqr.tasks.run import Part, Task
from mlx_lqr.tasks.steering import Steered

SPLITS: Mapping[Purpose, str] = {"fitting": "fit", "tuning": "tune", "evaluation": "report"}
"""The rows of chat.jsonl that each purpose may see."""


@dataclass(frozen=True)
class Fact:
    """A question with one right answer, in any of several wordings."""

    question: str
    answers: tuple[str, ...]

    def is_in(self, text: str) -> bool:
        """Whether a text has the answer in it."""
        return self._pattern.search(text) is not None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, self.answers))})(?!\w)", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Correctness:
    """The scorer of answers to factual questions."""

    facts: Sequence[Fact]
    samples: int

    @property
    def settings(self) -> Row:
        return {"facts": digest([(fact.question, fact.answers) for fact in self.facts])}

    def score(self, texts: Sequence[str], rows: range) -> list[Row]:
        asked = [self.facts[row // self.samples] for row in rows]
        return [{"correct": fact.is_in(text)} for fact, text in zip(asked, texts, strict=True)]

    def metrics(self, rows: Sequence[Row], groups: Sequence[int]) -> dict[str, Metric]:
        return {"accuracy": mean([row["correct"] for row in rows], groups, share=True)}


@dataclass(frozen=True, eq=False)
class Facts:
    """The part: answers to factual questions, of which only the accuracy is reported."""

    answers: Generations
    name: str = "facts"

    def __len__(self) -> int:
        return len(self.answers)

    def settings(self, model: Runner) -> Row:
        return self.answers.settings(model)

    def rows(self, steered: Steered, indices: range) -> list[Row]:
        return self.answers.rows(steered, indices)

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        return {"accuracy": self.answers.metrics(rows)["accuracy"]}


def bundled_questions(purpose: Purpose = "evaluation") -> tuple[list[str], list[Fact]]:
    """Our open questions and our factual ones."""
    rows = [row for line in bundled_lines("chat.jsonl") if (row := json.loads(line))["split"] == SPLITS[purpose]]
    facts = [Fact(row["question"], tuple(row["answers"])) for row in rows if "answers" in row]
    return [row["question"] for row in rows if "answers" not in row], facts


def chat(
    words: Sequence[str],
    *,
    questions: Sequence[str] | None = None,
    facts: Sequence[Fact] | None = None,
    purpose: Purpose = "evaluation",
    limit: int | None = None,
    decoding: Decoding | None = None,
    judge: Judge | None = None,
    damage: Sequence[Part] = (),
) -> Task:
    """The task.

    Args:
        words: the concept's family, see `word_family`.
        questions: open ones; by default the bundled ones.
        facts: factual ones; by default the bundled ones.
        purpose: which of the bundled ones.
        limit: take this many of each, spread evenly.
        decoding: of the answers to open questions; facts are answered once, with the likeliest tokens.
        judge: measures the fluency of the answers to open questions.
        damage: parts that measure damage.

    Raises:
        InputError: no words or no questions.
    """
    ours, our_facts = bundled_questions(purpose)
    asked = _limited(ours if questions is None else questions, limit)
    known = _limited(our_facts if facts is None else facts, limit)
    decoding = decoding or Decoding()
    greedy = replace(decoding, temperature=0.0, samples=1)
    judge = judge or Judge()
    answers = Generations(asked, WordFamily(words), decoding, judge, chat=True, name="answers")
    recalled = Generations([fact.question for fact in known], Correctness(known, 1), greedy, judge, chat=True)
    parts: tuple[Part, ...] = (answers, Facts(recalled), *damage)
    return Task("chat", parts, "prevalence", "share of answers with a word of the concept")


def _limited(rows: Sequence[Any], limit: int | None) -> list[Any]:
    if not rows:
        raise InputError("there are no questions to ask: give at least one")
    return list(rows) if limit is None else spread(rows, limit)


def _of_options(options: Mapping[str, Any], settings: TaskSettings) -> Task:
    file, fact_file = options["questions"], options["facts"]
    questions = None if file is None else [row["question"] for row in read_rows(file, {"question": "text"})]
    facts = None
    if fact_file is not None:
        rows = read_rows(fact_file, {"question": "text", "answers": "texts"})
        facts = [Fact(row["question"], tuple(row["answers"])) for row in rows]
    return chat(
        words_of(options["words"], settings.concepts),
        questions=questions,
        facts=facts,
        purpose=settings.purpose,
        limit=settings.limit,
        decoding=settings.decoding,
        judge=settings.judge,
        damage=settings.damage,
    )


CHAT = TaskKind(
    "chat",
    """How answers in a chat change, and stay right.

    Open questions are to be answered with the concept, and factual ones correctly still.""",
    (
        TaskOption("words", "Such as ocean,sea,wave*; by default those of a bundled concept.", metavar="WORDS"),
        TaskOption("questions", "Open questions instead of ours. Rows: question.", metavar="FILE"),
        TaskOption("facts", "Factual questions instead of ours. Rows: question, answers.", metavar="FILE"),
    ),
    Decoding(),
    _of_options,
)
