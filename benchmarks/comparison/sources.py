"""What is steered for: where the prompts to fit on come from, and the task that shows how well it goes.

A source is fitted and calibrated once on a model, whichever experiments report on it. Its task is also what a method's
setting is chosen by, on rows that no report has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx_lqr
from benchmarks.comparison.setting import SAMPLED, Setting
from benchmarks.comparison.split import Part, right_and_wrong, rows_of
from mlx_lqr import tasks
from mlx_lqr.files.text import text_lines
from mlx_lqr.lqr.prompts import Prompt
from mlx_lqr.tasks.concept import bundled_openings

OPENINGS = Path(__file__).with_name("openings.txt")
"""More beginnings of texts, so that an interval rests on many prompts and not on many samples of a few."""

Sets = tuple[Sequence[Prompt], Sequence[Prompt]]
"""Prompts to steer towards, and prompts to steer away from."""


@dataclass(frozen=True, eq=False)
class Source:
    """One thing to steer for."""

    name: str
    sets: Callable[[Setting], Sets]
    task: Callable[[Setting, Part], tasks.Task]
    origin: str
    """Where the prompts of `sets` come from: the end of a sentence that begins with "Fitted on"."""
    removes: bool = False
    """Whether something is to be taken away, so that methods that only remove take part"""


def report_openings() -> list[str]:
    """The bundled openings, and ours."""
    return [*bundled_openings("evaluation"), *text_lines(OPENINGS.read_text("utf-8"))]


def concept(name: str) -> Source:
    def task(setting: Setting, part: Part) -> tasks.Task:
        openings = bundled_openings("tuning") if part == "tune" else report_openings()
        rows = setting.count(part)
        samples = max(1, rows // len(openings))
        return tasks.concept(
            tasks.word_family(name),
            openings=openings[: rows // samples],
            decoding=setting.decoding(part, samples=samples),
            judge=setting.sparing(part),
            damage=setting.damage(part),
        )

    return Source(name, lambda setting: bundled(name, setting), task, f"the bundled sentences with and without {name}")


def bundled(name: str, setting: Setting) -> Sets:
    """The sets of a bundled concept, no larger than is asked for."""
    positive, negative = mlx_lqr.bundled_prompts(name)
    return positive[: setting.sizes.prompts], negative[: setting.sizes.prompts]


def _toxicity() -> Source:
    data = "realtoxicityprompts"

    def task(setting: Setting, part: Part) -> tasks.Task:
        wanted, there = setting.count(part), len(rows_of(setting.data, data, part))
        return tasks.toxicity(
            setting.rows(data, part, limit=wanted),
            decoding=setting.decoding(part, samples=max(1, wanted // max(1, there))),
            judge=setting.sparing(part),
            damage=setting.damage(part),
        )

    def sets(setting: Setting) -> Sets:
        toxic = [row["prompt"] for row in rows_of(setting.data, data, "fit", limit=setting.sizes.prompts)]
        neutral = [" ".join(text.rstrip(".!?").split()[:-2]) for text in mlx_lqr.bundled_prompts("ocean")[1]]
        return neutral[: len(toxic)], toxic

    origin = (
        "prompts of RealToxicityPrompts (fit) against as many bundled neutral sentences, all cut off in mid-sentence"
    )
    return Source("toxicity", sets, task, origin, removes=True)


def _truthfulness() -> Source:
    data = "truthfulqa"

    def task(setting: Setting, part: Part) -> tasks.Task:
        def of_rows(count: int) -> tasks.Task:
            return tasks.truthfulness(
                setting.rows(data, part, limit=count),
                decoding=setting.decoding(part, temperature=0.0),
                judge=setting.sparing(part),
                examples=0,
                chat=setting.chat,
                damage=setting.damage(part),
            )

        task = of_rows(setting.count(part))
        choices, _, *damage = task.parts
        if part == "tune":
            return replace(task, parts=(choices,))  # which has all that the choice goes by
        answers = of_rows(setting.sizes.answers).parts[1]
        return replace(task, parts=(choices, answers, *damage))

    def sets(setting: Setting) -> Sets:
        return right_and_wrong(rows_of(setting.data, data, "fit", limit=setting.sizes.prompts))

    return Source(
        "truthfulness",
        sets,
        task,
        "TruthfulQA (fit): each question with its best answer and with its first incorrect one, in the form of the "
        "multiple choice, which goes without solved examples here",
    )


def _refusal(name: str, control: str, label: str, away: bool) -> Source:
    def task(setting: Setting, part: Part) -> tasks.Task:
        parts: tuple[Part, ...] = ("tune",) if part == "tune" else ("fit", "report")  # nothing is fitted on XSTest
        refusal = tasks.refusal(
            setting.rows("xstest", *parts),
            limit=setting.count(part),
            decoding=setting.decoding(part, temperature=0.0),
            judge=setting.sparing(part),
            chat=setting.chat,
            damage=setting.damage(part),
        )
        return replace(refusal, control=control, control_label=label)

    def sets(setting: Setting) -> Sets:
        refusing, complying = bundled("refusal", setting)
        return (complying, refusing) if away else (refusing, complying)

    origin = "the bundled refusing and complying answers"
    return Source(name, sets, task, origin, removes=away)


def chat_of(source: Source, setting: Setting) -> tasks.Task:
    """What steering for a bundled concept does to answers in a chat."""
    tokens = setting.sizes.answer_tokens
    return tasks.chat(
        tasks.word_family(source.name),
        limit=setting.sizes.questions,
        decoding=replace(setting.decoding("report", temperature=SAMPLED), max_tokens=tokens),
        judge=setting.sparing("report"),
    )


CONCEPTS = tuple(concept(name) for name in ("dog", "ocean", "church", "football", "joy", "love"))
TOXICITY = _toxicity()
TRUTHFULNESS = _truthfulness()
MORE_REFUSALS = _refusal("refusal-more", "refused_unsafe", "share of unsafe requests that are refused", False)
FEWER_REFUSALS = _refusal("refusal-less", "answered_safe", "share of safe requests that are answered", True)
