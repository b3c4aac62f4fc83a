"""What an evaluation task says of itself, so that `eval`, `compare` and `tune` have a command for it.

A task is one file of this folder, with its rows, its metrics and its `TaskKind`, and one line of registry.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_lqr.tasks.generations import Decoding, Judge
from mlx_lqr.tasks.run import Part, Task

Purpose = Literal["fitting", "tuning", "evaluation"]


@dataclass(frozen=True)
class TaskOption:
    """An option of one task's command."""

    name: str
    """--NAME, with dashes for underscores."""
    help: str
    default: Any = None
    """Its type is the option's: a bool is a flag, and None is text that may be left out."""
    metavar: str | None = None
    """FILE for the name of a file."""
    required: bool = False
    off: str = ""
    """For a flag that is on by default: the name that turns it off."""
    needs_judge: bool = False
    """Whether it asks a model, so that --judge has to name one."""


@dataclass(frozen=True)
class TaskSettings:
    """What every task is told."""

    decoding: Decoding
    judge: Judge
    """Without a model while options are checked, before any model is loaded."""
    damage: Sequence[Part]
    limit: int | None
    """How many rows to take; None: all."""
    concepts: Sequence[str]
    """The concepts of what steers."""
    purpose: Purpose
    """Which of the bundled rows are to be seen: tuning has others than evaluation."""


@dataclass(frozen=True)
class TaskKind:
    """One kind of task."""

    name: str
    help: str
    """The command's help; its first line is at most 45 characters long."""
    options: Sequence[TaskOption]
    decoding: Decoding
    """How texts are sampled by default."""
    make: Callable[[Mapping[str, Any], TaskSettings], Task]
    """The task, from a value for each of `options` and what every task is told.

    Raises:
        InputError: rows or options that cannot be used.
    """


DATA = TaskOption("data", "The task's rows, as JSON lines.", metavar="FILE", required=True)
CHAT_TEMPLATE = TaskOption("chat", "Use the model's chat template.", default=True, off="no-chat")


def with_data(task: Callable[..., Task]) -> Callable[[Mapping[str, Any], TaskSettings], Task]:
    """`TaskKind.make` for a task whose function takes its options by their names, and the rows from a file."""

    def make(options: Mapping[str, Any], settings: TaskSettings) -> Task:
        return task(
            **options,
            limit=settings.limit,
            decoding=settings.decoding,
            judge=settings.judge,
            damage=settings.damage,
        )

    return make
