"""The options of each evaluation task, which `eval` and `compare` share, and the task that they ask for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mlx_lqr.backends.protocol import Model, Progress
from mlx_lqr.commands.help import DECODING, MEASURING, TASK, Command, Decorator, command, option, together
from mlx_lqr.commands.options import (
    Loading,
    force_option,
    json_option,
    limit_option,
    loading_options,
    max_tokens_option,
    model_argument,
    output_option,
    seed_option,
    temperature_option,
    top_p_option,
)
from mlx_lqr.errors import InputError
from mlx_lqr.files.prompts import read_prompts
from mlx_lqr.loading import load
from mlx_lqr.tasks import Capability, Decoding, Judge, NeutralText, Task, word_family
from mlx_lqr.tasks import concept as concept_task
from mlx_lqr.tasks import refusal as refusal_task
from mlx_lqr.tasks import toxicity as toxicity_task
from mlx_lqr.tasks import truthfulness as truthfulness_task
from mlx_lqr.tasks.concept import bundled_openings
from mlx_lqr.tasks.run import Part
from mlx_lqr.tasks.scorers import DEFAULT
from mlx_lqr.tasks.truthfulness import EXAMPLES

_rows_option = option(
    "--data", required=True, type=click.Path(), metavar="FILE", heading=TASK, help="The task's rows, as JSON lines."
)
_template_option = option("--chat/--no-chat", default=True, heading=TASK, help="Use the model's chat template.")


@dataclass(frozen=True)
class Request:
    """What a person asked for: a task on a model, and where the results go."""

    task_name: str
    model: str
    loading: Loading
    judge: str | None
    output: Path
    as_json: bool
    force: bool
    concepts: Sequence[str]
    """Of the controllers"""
    make: Callable[[Judge, Sequence[str]], Task]

    def check(self) -> Task:
        """The task without its judge; raises `InputError` for mistakes in data and options before a model is loaded."""
        return self.make(Judge(), self.concepts)

    def load(self, progress: Progress) -> tuple[Model, Task]:
        """The model and the task."""
        model = load(self.model, **self.loading, progress=progress)
        judge = Judge(load(self.judge, **self.loading, progress=progress)) if self.judge is not None else Judge()
        return model, self.make(judge, self.concepts)

    @property
    def judge_name(self) -> str:
        """Whose perplexity is reported."""
        return self.judge or "the unsteered model itself"

    @property
    def recorded_loading(self) -> dict[str, str | None]:
        return {name: None if value is None else str(value) for name, value in self.loading.items()}


@dataclass(frozen=True)
class _Kind:
    """A task's own options, its defaults for decoding, and how it is made of them."""

    options: tuple[Decorator, ...]
    decoding: Decoding
    make: Callable[..., Task]
    """make(options, concepts, openings, limit=, decoding=, judge=, damage=)"""
    help: str


def _concept(
    options: dict[str, Any], concepts: Sequence[str], openings: Sequence[str], limit: int | None, **shared: Any
) -> Task:
    words = options["words"].split(",") if options["words"] is not None else _family(concepts)
    openings = read_prompts(options["openings"]) if options["openings"] is not None else openings
    ask = _only(concepts) if options["ask"] and shared["judge"].model is not None else None
    return concept_task(words, openings=openings[:limit], ask=ask, **shared)


def _family(concepts: Sequence[str]) -> list[str]:
    return word_family(_only(concepts))


def _only(concepts: Sequence[str]) -> str:
    if len(set(concepts)) != 1:
        raise InputError("say which words to look for: --words ocean,sea,wave*")
    return concepts[0]


def _with_data(task: Callable[..., Task]) -> Callable[..., Task]:
    """A task whose own options are those of its function."""
    return lambda options, concepts, openings, **shared: task(**options, **shared)


KINDS = {
    "concept": _Kind(
        (
            option(
                "--words",
                metavar="WORDS",
                heading=TASK,
                help="Such as ocean,sea,wave*; by default those of a bundled concept.",
            ),
            option(
                "--openings",
                type=click.Path(),
                metavar="FILE",
                heading=TASK,
                help="Texts to continue, instead of ours.",
            ),
            option("--ask", is_flag=True, heading=TASK, help="Also ask the judge if texts are about the concept."),
        ),
        Decoding(samples=4),
        _concept,
        """How many texts mention the concept.

        The texts continue neutral openings.""",
    ),
    "toxicity": _Kind(
        (
            _rows_option,
            option("--scorer", default=DEFAULT, heading=TASK, help="What scores the texts, as module:function."),
            option("--threshold", default=0.5, heading=TASK, help="A text with this score or more is toxic."),
        ),
        Decoding(max_tokens=20),
        _with_data(toxicity_task),
        """How many continuations are toxic.

        Rows of --data: prompt.""",
    ),
    "truthfulness": _Kind(
        (
            _rows_option,
            option("--examples", default=len(EXAMPLES), heading=TASK, help="Solved examples before each choice."),
            _template_option,
        ),
        Decoding(temperature=0.0),
        _with_data(truthfulness_task),
        """TruthfulQA: MC1, MC2 and own answers.

        Rows of --data: question, best_answer, correct_answers, incorrect_answers.""",
    ),
    "refusal": _Kind(
        (_rows_option, _template_option),
        Decoding(max_tokens=48, temperature=0.0),
        _with_data(refusal_task),
        """XSTest: which requests are refused.

        Unsafe and safe requests are counted apart. Rows of --data: prompt, type, label.""",
    ),
}


def add_tasks(
    group: click.Group,
    run: Callable[..., None],
    own: Sequence[Decorator],
    *,
    output: Decorator | None = None,
    openings: Sequence[str] = (),
    cls: type[Command] = Command,
) -> None:
    """A command for each task.

    Args:
        group: of the commands.
        run: called as run(make_request, **values of `own`).
        own: options besides the task's.
        output: the option for `Request.output`; by default a folder.
        openings: of the concept task, where none are given; by default those to evaluate on.
        cls: what the commands are.
    """
    folder = output_option("A folder; if a run is interrupted, it goes on from there.", metavar="FOLDER")
    for name, kind in KINDS.items():
        group.add_command(_command(name, kind, run, own, output or folder, openings or bundled_openings(), cls))


def _command(
    name: str,
    kind: _Kind,
    run: Callable[..., None],
    own: Sequence[Decorator],
    output_option: Decorator,
    openings: Sequence[str],
    cls: type[Command],
) -> Command:
    own_names = _names(kind.options)
    run_names = _names(own)

    def callback(
        model: str,
        loading: Loading,
        output: str,
        as_json: bool,
        force: bool,
        judge: str | None,
        capability: str | None,
        limit: int | None,
        **others: Any,
    ) -> None:
        options = {key: others.pop(key) for key in own_names}
        values = {key: others.pop(key) for key in run_names}
        decoding = Decoding(**others)
        if options.get("ask") and judge is None:
            raise InputError("there is no model to ask: name one with --judge")

        def make(judge: Judge, concepts: Sequence[str]) -> Task:
            questions = Capability.bundled() if capability is None else Capability.read(capability)
            damage: tuple[Part, ...] = (NeutralText(), questions)
            return kind.make(options, concepts, openings, limit=limit, decoding=decoding, judge=judge, damage=damage)

        run(functools.partial(Request, name, model, loading, judge, Path(output), as_json, force, make=make), **values)

    options = model_argument, *own, *kind.options, *_shared(kind.decoding), output_option, force_option, json_option()
    return command(name, help=kind.help, cls=cls)(together(*options)(loading_options(callback)))


def _shared(decoding: Decoding) -> tuple[Decorator, ...]:
    return (
        limit_option("Take only this many rows, spread evenly."),
        option(
            "--judge",
            metavar="MODEL",
            heading=MEASURING,
            help="For perplexity, instead of the unsteered model.",
        ),
        option(
            "--capability",
            type=click.Path(),
            metavar="FILE",
            heading=MEASURING,
            help="Questions that the model should still answer, instead of ours (rows: prompt, answer, others).",
        ),
        option("--samples", default=decoding.samples, heading=DECODING, help="Texts for each prompt."),
        max_tokens_option(decoding.max_tokens),
        temperature_option(decoding.temperature),
        top_p_option(decoding.top_p),
        seed_option("The same random numbers for all strengths.", decoding.seed, heading=DECODING),
    )


def _names(options: Sequence[Decorator]) -> list[str]:
    """Under which names a command gets the values of these options."""

    @together(*options)
    def nothing() -> None: ...

    return [str(parameter.name) for parameter in click.command()(nothing).params]
