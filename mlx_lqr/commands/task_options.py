"""The options of each evaluation task, which `eval` and `compare` share, and the task that they ask for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mlx_lqr.backends.protocol import Model, Progress
from mlx_lqr.commands.options import Loading, force_option, loading_options, model_argument
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

Options = dict[str, Any]
_DATA = click.option("--data", required=True, type=click.Path(), metavar="FILE", help="The task's rows, as JSON lines.")
_CHAT = click.option("--chat/--no-chat", default=True, show_default=True, help="Use the model's chat template.")


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
    """Of what steers"""
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
        """Whose perplexity it is."""
        return self.judge or "the unsteered model itself"

    @property
    def recorded_loading(self) -> dict[str, str | None]:
        return {name: None if value is None else str(value) for name, value in self.loading.items()}


@dataclass(frozen=True)
class _Kind:
    """A task's own options, its defaults for decoding, and how it is made of them."""

    options: tuple[Callable[[Any], Any], ...]
    decoding: Decoding
    make: Callable[..., Task]
    """make(options, concepts, openings, limit=, decoding=, judge=, damage=)"""
    help: str


def _concept(
    options: Options, concepts: Sequence[str], openings: Sequence[str], limit: int | None, **shared: Any
) -> Task:
    words = options["words"].split(",") if options["words"] is not None else _family(concepts)
    openings = read_prompts(options["openings"]) if options["openings"] is not None else openings
    ask = _only(concepts) if options["ask"] and shared["judge"].model is not None else None
    return concept_task(words, openings=openings[:limit], ask=ask, **shared)


def _family(concepts: Sequence[str]) -> list[str]:
    return word_family(_only(concepts))


def _only(concepts: Sequence[str]) -> str:
    if len(set(concepts)) != 1:
        raise InputError("which words to look for? give them, --words ocean,sea,wave*")
    return concepts[0]


def _with_data(task: Callable[..., Task]) -> Callable[..., Task]:
    """A task whose own options are those of its function."""
    return lambda options, concepts, openings, **shared: task(**options, **shared)


KINDS = {
    "concept": _Kind(
        (
            click.option("--words", metavar="WORDS", help="ocean,sea,wave*; by default those of a bundled concept."),
            click.option("--openings", type=click.Path(), metavar="FILE", help="Texts to go on with, instead of ours."),
            click.option("--ask", is_flag=True, help="Ask the judge too whether texts have to do with the concept."),
        ),
        Decoding(samples=4),
        _concept,
        "How many texts from neutral openings mention the concept.",
    ),
    "toxicity": _Kind(
        (
            _DATA,
            click.option("--scorer", default=DEFAULT, show_default=True, help="module:function, texts to scores."),
            click.option("--threshold", default=0.5, show_default=True, help="From which score on a text is toxic."),
        ),
        Decoding(max_tokens=20),
        _with_data(toxicity_task),
        "How many continuations of prompts are toxic (rows: prompt).",
    ),
    "truthfulness": _Kind(
        (
            _DATA,
            click.option("--examples", default=len(EXAMPLES), show_default=True, help="Solved examples before MC."),
            _CHAT,
        ),
        Decoding(temperature=0.0),
        _with_data(truthfulness_task),
        "TruthfulQA: MC1, MC2 and own answers (rows: question, best_answer, correct_answers, incorrect_answers).",
    ),
    "refusal": _Kind(
        (_DATA, _CHAT),
        Decoding(max_tokens=48, temperature=0.0),
        _with_data(refusal_task),
        "XSTest: how many unsafe and safe requests are refused (rows: prompt, type, label).",
    ),
}


def add_tasks(
    group: click.Group,
    run: Callable[..., None],
    own: Sequence[Callable[[Any], Any]],
    *,
    output_help: str = "A folder; interrupted, a run goes on.",
    openings: Sequence[str] = (),
) -> None:
    """A command for each task.

    Args:
        group: of the commands.
        run: called as run(make_request, **values of `own`).
        own: options besides the task's.
        output_help: what `Request.output` is.
        openings: of the concept task, where none are given; by default those to evaluate on.
    """
    for name, kind in KINDS.items():
        group.add_command(_command(name, kind, run, own, output_help, openings or bundled_openings()))


def _command(
    name: str,
    kind: _Kind,
    run: Callable[..., None],
    own: Sequence[Callable[[Any], Any]],
    output_help: str,
    openings: Sequence[str],
) -> click.Command:
    own_names = [parameter.name for parameter in _parameters(kind.options)]
    run_names = [parameter.name for parameter in _parameters(own)]

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
        options = {str(key): others.pop(str(key)) for key in own_names}
        values = {str(key): others.pop(str(key)) for key in run_names}
        decoding = Decoding(**others)
        if options.get("ask") and judge is None:
            raise InputError("there is no model to ask: name one with --judge")

        def make(judge: Judge, concepts: Sequence[str]) -> Task:
            questions = Capability.bundled() if capability is None else Capability.read(capability)
            damage: tuple[Part, ...] = (NeutralText(), questions)
            return kind.make(options, concepts, openings, limit=limit, decoding=decoding, judge=judge, damage=damage)

        run(functools.partial(Request, name, model, loading, judge, Path(output), as_json, force, make=make), **values)

    command: Any = loading_options(callback)
    for option in reversed((model_argument, *own, *kind.options, *_shared(kind.decoding, output_help))):
        command = option(command)
    return click.command(name, help=kind.help)(command)


def _shared(decoding: Decoding, output_help: str) -> tuple[Callable[[Any], Any], ...]:
    return (
        click.option("-o", "--output", required=True, type=click.Path(), help=output_help),
        click.option("--limit", type=click.IntRange(min=1), help="Take only so many rows, spread over the data."),
        click.option("--samples", default=decoding.samples, show_default=True, help="Texts for each prompt."),
        click.option("-n", "--max-tokens", default=decoding.max_tokens, show_default=True, help="Of each, at most."),
        click.option("--temperature", default=decoding.temperature, show_default=True, help="0: likeliest token."),
        click.option("--top-p", default=decoding.top_p, show_default=True, help="Sample from these likeliest."),
        click.option("--seed", default=decoding.seed, show_default=True, help="The same for all strengths."),
        click.option("--judge", metavar="MODEL", help="For perplexity; by default the unsteered model itself."),
        click.option(
            "--capability",
            type=click.Path(),
            metavar="FILE",
            help="Questions (rows: prompt, answer, others), instead of ours.",
        ),
        force_option,
        click.option("--json", "as_json", is_flag=True, help="All numbers to stdout, for scripts."),
    )


def _parameters(options: Sequence[Callable[[Any], Any]]) -> list[click.Parameter]:
    """The parameters that decorators add."""

    def nothing() -> None: ...

    for option in options:
        option(nothing)
    return click.command()(nothing).params
