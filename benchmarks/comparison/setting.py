"""What every measurement is made with: the two models, the data, and how much is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.comparison.split import Part, rows_of, write_rows
from mlx_lqr import tasks
from mlx_lqr.backends.protocol import Model, Progress
from mlx_lqr.lqr.strength import BUDGETS, Budget
from mlx_lqr.tasks.generations import Judge
from mlx_lqr.tasks.read import bundled_text, spread
from mlx_lqr.tasks.records import CHUNK, Row
from mlx_lqr.tasks.run import Part as TaskPart
from mlx_lqr.tasks.steering import Steered

SAMPLED = 0.8
"""The temperature where texts are sampled. Sampling is fixed here, whatever the tasks' own defaults become."""
TOP_P = 0.9
PENALTY = 0.3
"""The frequency penalty where texts are sampled"""
SEEDS = {"tune": 0, "report": 1000}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    prompts: int = 70
    """To fit on, at most, of each kind"""
    tune_rows: int = 32
    """For the choice between a method's settings"""
    report_rows: int = 256
    questions: int = 50
    """Of the chat, open ones and factual ones, for each concept"""
    answers: int = 64
    """To TruthfulQA's questions in the model's own words, which say less than its multiple choice"""
    tune_tokens: int = 16
    report_tokens: int = 24
    answer_tokens: int = 30
    """Of answers in the chat"""
    judged: int = 4
    """One in so many texts has its perplexity measured, which costs as much as writing it"""
    capability: int = 20
    """Questions of capability"""
    sentences: int = 8
    """Of neutral text"""

    def limited(self, rows: int) -> Sizes:
        """As many reported rows, and of everything else as much less."""
        share = min(1.0, rows / self.report_rows)
        return replace(
            self,
            report_rows=min(rows, self.report_rows),
            tune_rows=min(rows, self.tune_rows),
            answers=min(rows, self.answers),
            questions=math.ceil(share * self.questions),
        )


FULL = Sizes()
QUICK = Sizes(
    prompts=6,
    tune_rows=4,
    report_rows=6,
    answers=4,
    questions=2,
    tune_tokens=6,
    report_tokens=8,
    answer_tokens=8,
    judged=2,
    capability=4,
    sentences=4,
)


@dataclass(frozen=True, eq=False)
class SparingJudge(Judge):
    """Measures the perplexity of the first of every few texts, and leaves out the others."""

    every: int = 1

    @property
    def settings(self) -> Row | str:
        return {"judge": super().settings, "every": self.every}

    def nll(self, steered: Steered, written: Sequence[tuple[str, str]], *, chat: bool) -> list[tuple[float, int]]:
        measured = super().nll(steered, written[:: self.every], chat=chat)
        return [(0.0, 0) if i % self.every else measured[i // self.every] for i in range(len(written))]


@dataclass(frozen=True, eq=False)
class Setting:
    """What an experiment is run with."""

    model: Model
    """The one that is steered"""
    judge: Model
    """The one that perplexities are measured under"""
    data: Path
    """The folder of the data files"""
    folder: Path
    """Everything that is measured on this model goes there"""
    sizes: Sizes
    dtype: str
    """That both models were loaded in"""
    progress: Progress | None = None
    budgets: Mapping[Budget, float] = field(default_factory=lambda: dict(BUDGETS))
    """Of damage, that the methods are measured at, the normal one among them"""
    choices: Path | None = None
    """Earlier results on this model, from which the others' settings and strengths are taken"""
    kept: Path | None = None
    """Earlier results on this model, from which all that the others reached is taken"""

    @property
    def chat(self) -> bool:
        return self.model.tokenizer.has_chat_template

    @property
    def loading(self) -> dict[str, str | None]:
        return {"dtype": self.dtype}

    def sparing(self, part: Part) -> SparingJudge:
        """The judge; of what settings are chosen by, which goes by control alone, it reads as little as possible."""
        return SparingJudge(self.judge, CHUNK if part == "tune" else self.sizes.judged)

    def say(self, stage: str) -> None:
        if self.progress:
            self.progress(stage, 0, 0)

    def rows(self, name: str, *parts: Part, limit: int | None = None) -> Path:
        """Some parts of a data file, as a file."""
        rows = rows_of(self.data, name, *parts, limit=limit)
        return write_rows(self.folder / "rows" / f"{name}-{'-'.join(parts)}-{len(rows)}.jsonl", rows)

    def count(self, part: Part) -> int:
        """How many rows of a part are measured."""
        return self.sizes.tune_rows if part == "tune" else self.sizes.report_rows

    def decoding(self, part: Part, *, samples: int = 1, temperature: float = SAMPLED) -> tasks.Decoding:
        tokens = self.sizes.tune_tokens if part == "tune" else self.sizes.report_tokens
        return tasks.Decoding(
            max_tokens=tokens,
            temperature=temperature,
            top_p=TOP_P,
            samples=samples,
            seed=SEEDS[part],
            frequency_penalty=PENALTY if temperature else 0.0,
        )

    def damage(self, part: Part) -> list[TaskPart]:
        """What is measured besides control; nothing where settings are only chosen."""
        if part == "tune":
            return []
        sentences = spread(bundled_text("neutral.txt").splitlines(), self.sizes.sentences)
        questions = spread(tasks.Capability.bundled().questions, self.sizes.capability)
        return [tasks.NeutralText(sentences), tasks.Capability(questions)]
