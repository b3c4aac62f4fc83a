"""Texts that a steered model writes: scored by the task, and measured for fluency.

The part that all generating tasks share. With n samples, prompt i has the rows i n .. i n + n - 1; each row is sampled
with `seed` + row at every strength. Each text is measured for distinct-1/2/3 and repetition (metrics.py) and for its
perplexity under a judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

import numpy as np

from mlx_lqr.backends.protocol import Continued, Recorder, Runner, Sampling
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.prompts import Prompt
from mlx_lqr.runtime import Options
from mlx_lqr.tasks.bootstrap import Metric, exponential_ratio, mean
from mlx_lqr.tasks.metrics import distinct, repetition, words
from mlx_lqr.tasks.records import Row, digest
from mlx_lqr.tasks.steering import Steered


@dataclass(frozen=True)
class Decoding:
    """How texts are sampled."""

    max_tokens: int = 40
    temperature: float = Sampling.temperature
    top_p: float = Sampling.top_p
    samples: int = 1
    """Texts per prompt"""
    seed: int = 0
    frequency_penalty: float | None = None
    """None: as everywhere, by the temperature"""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"samples must be at least 1, not {self.samples}")
        if self.max_tokens < 1:
            raise InputError(f"max_tokens (-n) must be at least 1, not {self.max_tokens}")
        _ = self._sampling  # refuses options that cannot be used for sampling

    def options(self, start: int) -> Options:
        """The options for rows from `start` on."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed + start,
            "frequency_penalty": self.frequency_penalty,
        }

    @property
    def settings(self) -> Row:
        """What decides on the texts, with the penalty that holds."""
        return {**asdict(self), "frequency_penalty": self._sampling.frequency}

    @property
    def _sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, frequency_penalty=self.frequency_penalty, seed=self.seed)


class TextScorer(Protocol):
    """How a task scores its texts."""

    @property
    def settings(self) -> Row: ...

    def score(self, texts: Sequence[str], rows: range) -> list[Row]:
        """Fields for the rows of these texts; the text of a row follows prompt number row // samples."""

    def metrics(self, rows: Sequence[Row], groups: Sequence[int]) -> dict[str, Metric]:
        """`groups[i]` is the number of the prompt of `rows[i]`."""


@dataclass(frozen=True, eq=False)
class Judge:
    """The model whose probabilities say how natural a text is: another local model, or the unsteered model itself.

    A text that is unlikely for the model itself need not read badly, and the other way round; a larger model is a
    better judge. Perplexities are per token of the judge, so they can be compared only under the same judge.
    """

    model: Recorder | None = None

    @property
    def settings(self) -> Row | str:
        if self.model is None:
            return "the unsteered model itself"
        return {"name": self.model.name, "fingerprint": self.model.fingerprint}

    def nll(self, steered: Steered, written: Sequence[tuple[str, str]], *, chat: bool) -> list[tuple[float, int]]:
        """For each (prompt, text): the negative log-likelihood of the text in nats, and its number of tokens."""
        judge = Steered(self.model) if self.model is not None else steered.unsteered
        pairs = [_continued(judge.model, prompt, text, chat) for prompt, text in written]
        return [(-float(text.sum()), len(text)) for text in judge.log_probabilities(pairs)]


@dataclass(frozen=True, eq=False)
class Generations:
    """The part: texts that follow prompts, with the fields of a task's scorer."""

    prompts: Sequence[str]
    scorer: TextScorer
    decoding: Decoding = field(default_factory=Decoding)
    judge: Judge = field(default_factory=Judge)
    chat: bool = False
    """True: prompts are user messages, put into the model's chat template. False: they are texts to continue."""
    name: str = "generations"

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("there are no prompts to continue: give at least one")

    def __len__(self) -> int:
        return len(self.prompts) * self.decoding.samples

    def settings(self, model: Runner) -> Row:
        return {
            "prompts": digest(list(self.prompts)),
            "chat": self.chat,
            "judge": self.judge.settings,
            **self.decoding.settings,
            **self.scorer.settings,
        }

    def rows(self, steered: Steered, indices: range) -> list[Row]:
        chosen = [self.prompts[i // self.decoding.samples] for i in indices]
        prompts: list[Prompt] = [chat_prompt(steered.model, text) if self.chat else text for text in chosen]
        written = steered.texts(prompts, self.decoding.options(indices.start))
        scored = self.scorer.score([text for text, _ in written], indices)
        texts = [(prompt, text) for prompt, (text, _) in zip(chosen, written, strict=True)]
        judged = self.judge.nll(steered, texts, chat=self.chat)
        return [
            {"prompt": prompt, "text": text, "tokens": count, "nats": nats, "judged_tokens": tokens, **fields}
            for prompt, (text, count), (nats, tokens), fields in zip(chosen, written, judged, scored, strict=True)
        ]

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        groups = [int(row["index"]) // self.decoding.samples for row in rows]
        split = [words(row["text"]) for row in rows]
        nll = np.array([(row["nats"], row["judged_tokens"]) for row in rows], np.float64)
        return {
            **self.scorer.metrics(rows, groups),
            "perplexity": Metric(nll, np.asarray(groups, np.int64), exponential_ratio),
            **{f"distinct_{n}": mean([distinct(text, n) for text in split], groups) for n in (1, 2, 3)},
            "repetition": mean([repetition(text) for text in split], groups),
            "tokens": mean([row["tokens"] for row in rows], groups),
        }


def chat_prompt(model: Runner, message: str) -> Prompt:
    """A user's message in the model's chat template; for a model without one, the message and a newline."""
    if model.tokenizer.has_chat_template:
        return model.tokenizer.chat([{"role": "user", "content": message}])
    return message + "\n"


def _continued(model: Recorder, prompt: str, text: str, chat: bool) -> Continued:
    """Token ids of a prompt, and of the text that follows it."""
    tokenizer = model.tokenizer
    if chat and tokenizer.has_chat_template:
        before, (after,) = tokenizer.chat_continuations([{"role": "user", "content": prompt}], [text])
    else:
        before, (after,) = tokenizer.continuations(prompt + "\n" if chat else prompt, [text])
    return before, after


def over_prompts(
    of: Callable[[Sequence[float]], float], values: Iterable[float], groups: Sequence[int]
) -> tuple[list[float], list[int]]:
    """`of` of the values of each prompt's samples, and the prompts' numbers."""
    by_prompt: dict[int, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        by_prompt.setdefault(group, []).append(float(value))
    return [of(samples) for samples in by_prompt.values()], list(by_prompt)
