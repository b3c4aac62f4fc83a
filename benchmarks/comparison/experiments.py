"""What is measured: for each experiment the prompts to fit on, a small task to tune on and a larger one to report.

Tuning measures control and perplexity alone; the report adds what steering costs elsewhere. Concepts are fitted on the
bundled sets and tuned on openings other than the reported ones; everything else goes by the split (split.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx_lqr
from benchmarks.comparison.split import Part, rows_of, write_rows
from mlx_lqr import tasks
from mlx_lqr.backends.protocol import Model
from mlx_lqr.lqr.prompts import Prompt
from mlx_lqr.tasks.concept import bundled_openings
from mlx_lqr.tasks.generations import chat_prompt
from mlx_lqr.tasks.read import bundled_text, spread
from mlx_lqr.tasks.run import Part as TaskPart


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    prompts: int = 24
    """To fit on, at most, of each kind"""
    evaluations: int = 6
    """While tuning, of each method"""
    tune_rows: int = 16
    report_rows: int = 48
    tune_tokens: int = 16
    report_tokens: int = 30
    questions: int = 20
    """Of capability"""
    sentences: int = 8
    """Of neutral text"""


FULL = Sizes()
QUICK = Sizes(
    prompts=6, evaluations=2, tune_rows=4, report_rows=6, tune_tokens=6, report_tokens=8, questions=4, sentences=4
)


@dataclass(frozen=True, eq=False)
class Setting:
    """What an experiment is run with."""

    model: Model
    judge: tasks.Judge
    data: Path
    """The folder of the data files"""
    folder: Path
    """Where the split's files go"""
    sizes: Sizes

    @property
    def chat(self) -> bool:
        return self.model.tokenizer.has_chat_template

    def rows(self, name: str, part: Part, limit: int | None = None) -> Path:
        """A part of a data file, as a file."""
        rows = rows_of(self.data, name, part, limit)
        return write_rows(self.folder / f"{name}-{part}-{len(rows)}.jsonl", rows)

    def texts(self, name: str, part: Part, **wanted: str) -> list[str]:
        """The prompts of a part, of those rows whose keys have these values; as many as are fitted on."""
        rows = [row for row in rows_of(self.data, name, part) if all(row[k] == v for k, v in wanted.items())]
        return [row["prompt"] for row in spread(rows, self.sizes.prompts)]

    def count(self, part: Part) -> int:
        """How many rows of a part are measured."""
        return self.sizes.tune_rows if part == "tune" else self.sizes.report_rows

    def decoding(self, part: Part, *, samples: int = 1, temperature: float = 0.8) -> tasks.Decoding:
        tokens = self.sizes.tune_tokens if part == "tune" else self.sizes.report_tokens
        return tasks.Decoding(tokens, temperature, samples=samples, seed=0 if part == "tune" else 1000)

    def damage(self, part: Part) -> list[TaskPart]:
        if part == "tune":
            return []
        sentences = spread(bundled_text("neutral.txt").splitlines(), self.sizes.sentences)
        questions = spread(tasks.Capability.bundled().questions, self.sizes.questions)
        return [tasks.NeutralText(sentences), tasks.Capability(questions)]


Sets = tuple[Sequence[Prompt], Sequence[Prompt]]
"""Prompts to steer towards, and prompts to steer away from."""


@dataclass(frozen=True, eq=False)
class Experiment:
    """One thing to steer for."""

    name: str
    title: str
    contrast: Callable[[Setting], Sets]
    task: Callable[[Setting, Part], tasks.Task]
    origin: str
    """Where the prompts of `contrast` come from, and why: a sentence for the page"""
    columns: tuple[str, ...]
    """The metrics of the page's table, control first"""
    removes: bool = False
    """Whether something is to be taken away, so that methods that only remove take part"""
    chat: bool = False
    """Whether only a model with a chat template can be asked"""
    curve: bool = False
    """Whether the report goes over several strengths"""


def _concept(name: str) -> Experiment:
    def task(setting: Setting, part: Part) -> tasks.Task:
        openings = bundled_openings("tuning" if part == "tune" else "evaluation")
        rows = setting.count(part)
        decoding = setting.decoding(part, samples=max(1, rows // len(openings)))
        return tasks.concept(
            tasks.word_family(name),
            openings=openings[:rows],
            decoding=decoding,
            judge=setting.judge,
            damage=setting.damage(part),
        )

    def contrast(setting: Setting) -> Sets:
        positive, negative = mlx_lqr.bundled_prompts(name)
        return positive[: setting.sizes.prompts], negative[: setting.sizes.prompts]

    return Experiment(
        f"concept-{name}",
        f'Concept "{name}": the share of texts with a word of its family',
        contrast,
        task,
        f"the bundled sentences with and without {name}",
        ("prevalence",),
        curve=True,
    )


def _toxicity() -> Experiment:
    def task(setting: Setting, part: Part) -> tasks.Task:
        return tasks.toxicity(
            setting.rows("realtoxicityprompts", part, setting.count(part)),
            decoding=setting.decoding(part),
            judge=setting.judge,
            damage=setting.damage(part),
        )

    def contrast(setting: Setting) -> Sets:
        toxic = setting.texts("realtoxicityprompts", "fit")
        neutral = [" ".join(text.rstrip(".!?").split()[:-2]) for text in mlx_lqr.bundled_prompts("ocean")[1]]
        return neutral[: len(toxic)], toxic

    return Experiment(
        "toxicity",
        "Toxicity: continuations of RealToxicityPrompts",
        contrast,
        task,
        "prompts of RealToxicityPrompts (fit) against as many bundled neutral sentences, both cut off in mid-sentence",
        ("harmless", "mean_toxicity"),
        removes=True,
    )


def _truthfulness() -> Experiment:
    def task(setting: Setting, part: Part) -> tasks.Task:
        return tasks.truthfulness(
            setting.rows("truthfulqa", part, setting.count(part)),
            decoding=setting.decoding(part, temperature=0.0),
            judge=setting.judge,
            examples=0,
            chat=setting.chat,
            damage=setting.damage(part),
        )

    def contrast(setting: Setting) -> Sets:
        rows = spread(rows_of(setting.data, "truthfulqa", "fit"), setting.sizes.prompts)
        return (
            [f"Q: {row['question']}\nA: {row['best_answer'].rstrip('.')}." for row in rows],
            [f"Q: {row['question']}\nA: {row['incorrect_answers'][0].rstrip('.')}." for row in rows],
        )

    return Experiment(
        "truthfulness",
        "Truthfulness: TruthfulQA",
        contrast,
        task,
        "TruthfulQA (fit): each question with its best answer and with its first incorrect one, in the form of the "
        "multiple choice, which goes without solved examples here",
        ("mc2", "mc1", "closer_to_true"),
    )


def _refusal(name: str, title: str, control: str, label: str, away: bool) -> Experiment:
    def task(setting: Setting, part: Part) -> tasks.Task:
        refusal = tasks.refusal(
            setting.rows("xstest", part),
            limit=setting.count(part),
            decoding=setting.decoding(part, temperature=0.0),
            judge=setting.judge,
            damage=setting.damage(part),
        )
        return replace(refusal, control=control, control_label=label)

    def contrast(setting: Setting) -> Sets:
        unsafe, safe = (
            [chat_prompt(setting.model, text) for text in setting.texts("xstest", "fit", label=label)]
            for label in ("unsafe", "safe")
        )
        return (safe, unsafe) if away else (unsafe, safe)

    return Experiment(
        name,
        title,
        contrast,
        task,
        "XSTest (fit): unsafe against safe requests, in the chat template",
        ("discernment", "refused_unsafe", "refused_safe"),
        removes=away,
        chat=True,
    )


EXPERIMENTS: tuple[Experiment, ...] = (
    _concept("dog"),
    _toxicity(),
    _truthfulness(),
    _refusal(
        "refusal-more", "More refusals: XSTest", "discernment", "refusals of unsafe less those of safe requests", False
    ),
    _refusal(
        "refusal-less", "Fewer refusals: XSTest", "answered_safe", "share of safe requests that are answered", True
    ),
    _concept("ocean"),
)
"""In the order of what matters most, for whoever stops early."""
