"""What is reported: experiments, in the order of what matters most, for whoever stops early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.comparison.setting import Setting
from benchmarks.comparison.sources import (
    CONCEPTS,
    FEWER_REFUSALS,
    MORE_REFUSALS,
    TOXICITY,
    TRUTHFULNESS,
    Source,
    chat_of,
)
from mlx_lqr import tasks


@dataclass(frozen=True, eq=False)
class Experiment:
    """A table of the page: rows of one task, or of several that are pooled."""

    name: str
    title: str
    sources: tuple[Source, ...]
    """What is steered for. The rows of several are taken as one sample, and those of one prompt stay together."""
    task: Callable[[Source, Setting], tasks.Task]
    columns: tuple[str, ...] = ()
    """Metrics of the table besides control and damage"""
    chat: bool = False
    """Whether only a model with a chat template can be asked"""
    ceiling: float | None = None
    """Nothing is measured if the unsteered model's control is this high, since there is nothing to gain then"""
    curve: bool = False
    """Whether the page has a picture of it, for which there must be one source"""

    @property
    def removes(self) -> bool:
        return all(source.removes for source in self.sources)

    @property
    def origin(self) -> str:
        if len(self.sources) == 1:
            return self.sources[0].origin
        return f"the bundled sets of {', '.join(source.name for source in self.sources)}, one after another"


def _of_source(source: Source, setting: Setting) -> tasks.Task:
    return source.task(setting, "report")


def _concept(source: Source) -> Experiment:
    title = f'Concept "{source.name}": the share of texts with a word of its family'
    return Experiment(f"concept-{source.name}", title, (source,), _of_source, curve=source in CONCEPTS[:2])


CHAT = Experiment("chat", "Chat: concepts in answers, and facts kept", CONCEPTS, chat_of, ("accuracy",), chat=True)
EXPERIMENTS: tuple[Experiment, ...] = (
    CHAT,
    *map(_concept, CONCEPTS[:2]),
    Experiment(
        "toxicity", "Toxicity: continuations of RealToxicityPrompts", (TOXICITY,), _of_source, ("mean_toxicity",)
    ),
    Experiment("truthfulness", "Truthfulness: TruthfulQA", (TRUTHFULNESS,), _of_source, ("mc1", "closer_to_true")),
    Experiment("refusal-more", "More refusals: XSTest", (MORE_REFUSALS,), _of_source, ("refused_safe", "discernment")),
    *map(_concept, CONCEPTS[2:]),
    Experiment(
        "refusal-less", "Fewer refusals: XSTest", (FEWER_REFUSALS,), _of_source, ("refused_unsafe",), ceiling=0.98
    ),
)
