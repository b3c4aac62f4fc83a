"""Concept: how many of the texts that follow neutral openings mention the concept, by its word family.

A word family is a list of words, matched as whole words in any case; `wave*` matches every word that begins with it. If
a local model is asked as well, a text counts as `judged` if the model is likelier to say Yes than No (scorers.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lqr.backends.protocol import Recorder
from mlx_lqr.errors import InputError
from mlx_lqr.files.prompts import read_prompts
from mlx_lqr.tasks.bootstrap import Metric, mean
from mlx_lqr.tasks.generations import Decoding, Generations, Judge
from mlx_lqr.tasks.kind import Purpose, TaskKind, TaskOption, TaskSettings
from mlx_lqr.tasks.read import bundled_lines, bundled_text
from mlx_lqr.tasks.records import Row
from mlx_lqr.tasks.run import Part, Task
from mlx_lqr.tasks.scorers import mentions
from mlx_lqr.tasks.steering import Steered


@dataclass(frozen=True, eq=False)
class WordFamily:
    """The scorer: whether a text has a word of the family."""

    words: Sequence[str]
    asked: Recorder | None = None
    """A model that is asked as well"""
    concept: str = ""
    """The concept it is asked about"""
    pattern: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", word_pattern(self.words))

    @property
    def settings(self) -> Row:
        settings: Row = {"words": list(self.words)}
        if self.asked is not None:
            settings |= {"asked": self.asked.fingerprint, "concept": self.concept}
        return settings

    def score(self, texts: Sequence[str], rows: range) -> list[Row]:
        rows_of_texts: list[Row] = [{"words": [word.lower() for word in self.pattern.findall(text)]} for text in texts]
        if self.asked is not None:
            for row, sure in zip(rows_of_texts, mentions(Steered(self.asked), self.concept, texts), strict=True):
                row["judged"] = sure
        return rows_of_texts

    def metrics(self, rows: Sequence[Row], groups: Sequence[int]) -> dict[str, Metric]:
        metrics = {"prevalence": mean([bool(row["words"]) for row in rows], groups, share=True)}
        if self.asked is not None:
            metrics["judged"] = mean([row["judged"] > 0.5 for row in rows], groups, share=True)
        return metrics


def word_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """A pattern for whole words of a family.

    Raises:
        InputError: no words, or one that is not like `ocean` or `wave*`.
    """
    parts = []
    for word in words:
        stem = word.strip().removesuffix("*")
        if not stem or "*" in stem:
            raise InputError(f"words must look like ocean,sea,wave*, not {','.join(words)!r}")
        parts.append(re.escape(stem) + (r"\w*" if word.strip().endswith("*") else ""))
    if not parts:
        raise InputError("give at least one word of the concept's family")
    return re.compile(rf"(?<!\w)(?:{'|'.join(parts)})(?!\w)", re.IGNORECASE)


def word_family(concept: str) -> list[str]:
    """The words of a bundled concept.

    Raises:
        InputError: the concept is not a bundled one.
    """
    families = json.loads(bundled_text("words.json"))
    if concept not in families:
        raise InputError(
            f"no words are known for the concept {concept!r}: give them, --words ocean,sea,wave* "
            f"(known: {', '.join(families)})"
        )
    return str(families[concept]).split()


def words_of(given: str | None, concepts: Sequence[str]) -> list[str]:
    """The words that a person gave, separated by commas, or those of the only concept.

    Raises:
        InputError: none were given, and there is not one bundled concept.
    """
    return word_family(_only(concepts)) if given is None else given.split(",")


def bundled_openings(purpose: Purpose = "evaluation") -> list[str]:
    """Beginnings of texts that could be about anything; evaluation has some to itself."""
    return bundled_lines("openings.txt" if purpose == "evaluation" else "tuning_openings.txt")


def concept(
    words: Sequence[str],
    *,
    openings: Sequence[str] = (),
    decoding: Decoding | None = None,
    judge: Judge | None = None,
    ask: str | None = None,
    damage: Sequence[Part] = (),
) -> Task:
    """The task.

    Args:
        words: the concept's family, see `word_family`.
        openings: texts to continue; by default the bundled ones.
        decoding: by default 4 samples per opening, of 40 tokens.
        judge: measures fluency.
        ask: the concept's name, to ask the judge's model about each text; the judge must have a model.
        damage: parts that measure damage.

    Raises:
        InputError: no words, or `ask` without a judge's model.
    """
    judge = judge or Judge()
    if ask is not None and judge.model is None:
        raise InputError("there is no model to ask: name one with --judge")
    scorer = WordFamily(words, judge.model if ask is not None else None, ask or "")
    prompts = openings or bundled_openings()
    generations = Generations(prompts, scorer, decoding or Decoding(samples=4), judge)
    return Task("concept", (generations, *damage), "prevalence", "share of texts with a word of the concept")


def _of_options(options: Mapping[str, Any], settings: TaskSettings) -> Task:
    file = options["openings"]
    openings = bundled_openings(settings.purpose) if file is None else read_prompts(file)
    ask = _only(settings.concepts) if options["ask"] and settings.judge.model is not None else None
    return concept(
        words_of(options["words"], settings.concepts),
        openings=openings[: settings.limit],
        decoding=settings.decoding,
        judge=settings.judge,
        ask=ask,
        damage=settings.damage,
    )


def _only(concepts: Sequence[str]) -> str:
    if len(set(concepts)) != 1:
        raise InputError("say which words to look for: --words ocean,sea,wave*")
    return concepts[0]


CONCEPT = TaskKind(
    "concept",
    """How many texts mention the concept.

    The texts continue neutral openings.""",
    (
        TaskOption("words", "Such as ocean,sea,wave*; by default those of a bundled concept.", metavar="WORDS"),
        TaskOption("openings", "Texts to continue, instead of ours.", metavar="FILE"),
        TaskOption("ask", "Also ask the judge if texts are about the concept.", default=False, needs_judge=True),
    ),
    Decoding(samples=4),
    _of_options,
)
