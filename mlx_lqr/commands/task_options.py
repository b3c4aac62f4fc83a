"""The options of each evaluation task, which `eval` and `compare` share, and the task that they ask for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mlx_lqr.backends.protocol import Model, Progress
from mlx_lqr.commands.help import DECODING, MEASURING, TASK, Command, Decorator, command, option, together
from mlx_lqr.commands.options import (
    Loading,
    force_option,
    frequency_penalty_option,
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
from mlx_lqr.commands.running import chosen_to_run, load_to_run
from mlx_lqr.errors import InputError
from mlx_lqr.loading import load
from mlx_lqr.methods.steering import Steering
from mlx_lqr.tasks import Capability, Decoding, Judge, NeutralText, Task
from mlx_lqr.tasks.kind import Purpose, TaskKind, TaskOption, TaskSettings
from mlx_lqr.tasks.registry import TASKS


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

    def load(self, progress: Progress, steerings: Iterable[Steering] | None = None) -> tuple[Model, Task]:
        """The model and the task.

        Args:
            steerings: what is to steer the model, where it is only run; None where it is also fitted for.
        """
        if steerings is None:
            model = load(self.model, **self.loading, progress=progress)
        else:
            model = load_to_run(self.model, self.loading, progress, steerings=steerings)
        if self.judge is None:
            return model, self.make(Judge(), self.concepts)
        without_adapter: Loading = {**self.loading, "adapter": None}
        return model, self.make(Judge(load(self.judge, **without_adapter, progress=progress)), self.concepts)

    @property
    def judge_name(self) -> str:
        """Whose perplexity is reported."""
        return self.judge or "the unsteered model itself"

    def recorded_loading(self, steerings: Iterable[Steering] | None = None) -> dict[str, str | None]:
        """How the model is loaded by `load`, without the adapter, which the model's name and fingerprint say."""
        loading = self.loading if steerings is None else chosen_to_run(self.model, self.loading, steerings)
        parts = {"backend": loading["backend"], "device": loading["device"], "dtype": loading["dtype"]}
        return {name: None if value is None else str(value) for name, value in parts.items()}


def add_tasks(
    group: click.Group,
    run: Callable[..., None],
    own: Sequence[Decorator],
    *,
    output: Decorator | None = None,
    purpose: Purpose = "evaluation",
    cls: type[Command] = Command,
) -> None:
    """A command for each task.

    Args:
        group: of the commands.
        run: called as run(make_request, **values of `own`).
        own: options besides the task's.
        output: the option for `Request.output`; by default a folder.
        purpose: which of the bundled rows are to be seen.
        cls: what the commands are.
    """
    folder = output_option("A folder; if a run is interrupted, it goes on from there.", metavar="FOLDER")
    for kind in TASKS.values():
        group.add_command(_command(kind, run, own, output or folder, purpose, cls))


def _command(
    kind: TaskKind,
    run: Callable[..., None],
    own: Sequence[Decorator],
    output_option: Decorator,
    purpose: Purpose,
    cls: type[Command],
) -> Command:
    own_options = [_option(one) for one in kind.options]
    own_names = _names(own_options)
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
        if judge is None and any(one.needs_judge and options[one.name] for one in kind.options):
            raise InputError("there is no model to ask: name one with --judge")

        def make(judge: Judge, concepts: Sequence[str]) -> Task:
            questions = Capability.bundled() if capability is None else Capability.read(capability)
            damage = (NeutralText(), questions)
            return kind.make(options, TaskSettings(decoding, judge, damage, limit, concepts, purpose))

        run(
            functools.partial(Request, kind.name, model, loading, judge, Path(output), as_json, force, make=make),
            **values,
        )

    options = model_argument, *own, *own_options, *_shared(kind.decoding), output_option, force_option, json_option()
    return command(kind.name, help=kind.help, cls=cls)(together(*options)(loading_options(callback)))


def _option(one: TaskOption) -> Decorator:
    flag = "--" + one.name.replace("_", "-")
    if isinstance(one.default, bool):
        declaration = f"{flag}/--{one.off}" if one.off else flag
        return option(declaration, is_flag=True, default=one.default, heading=TASK, help=one.help)
    given: dict[str, Any] = {"required": True} if one.required else {"default": one.default}
    kind = click.Path() if one.metavar == "FILE" else None
    return option(flag, type=kind, metavar=one.metavar, heading=TASK, help=one.help, **given)


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
        frequency_penalty_option(decoding.frequency_penalty),
        seed_option("The same random numbers for all strengths.", decoding.seed, heading=DECODING),
    )


def _names(options: Sequence[Decorator]) -> list[str]:
    """Under which names a command gets the values of these options."""

    @together(*options)
    def nothing() -> None: ...

    return [str(parameter.name) for parameter in click.command()(nothing).params if parameter.expose_value]
