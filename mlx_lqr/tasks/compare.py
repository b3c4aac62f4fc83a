"""Several methods at several strengths on one task, all with the same budget.

A budget is a number of settings: every method is run at equally many strengths, over the same prompts with the same
random numbers, and compared with one unsteered run. The strengths themselves may differ, since a strength means
different things for different methods. A method's best setting, read from these results, was chosen on the rows it is
reported for and looks a little better than it is; with equal budgets this is so for all methods alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from mlx_lqr.backends.protocol import Progress, Recorder
from mlx_lqr.errors import InputError
from mlx_lqr.tasks.run import Evaluation, Result, Task, evaluate
from mlx_lqr.tasks.steering import NamedSteering


@dataclass(frozen=True, eq=False)
class Contender:
    """A steering and the strengths to try it at."""

    steering: NamedSteering
    strengths: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """The results of every method."""

    task: str
    unsteered: Result
    methods: dict[str, list[Result]]
    settings: int
    """How many strengths of each method were run"""
    rows: int
    """Rows at each setting"""

    @property
    def budget(self) -> str:
        """The budget in a sentence."""
        tried = "; ".join(
            f"{name} at {', '.join(f'{result.strength:g}' for result in results)}"
            for name, results in self.methods.items()
        )
        settings = f"{self.settings} setting{'s' * (self.settings > 1)}"
        return f"Budget, the same for every method: {settings} of {self.rows} rows ({tried})"


def check_budgets(methods: Sequence[Contender]) -> None:
    """Raise `InputError` unless the methods have different names and equally many strengths, none of them 0."""
    names = [method.steering.name for method in methods]
    if not names:
        raise InputError("there is nothing to compare: give at least one controller")
    if len(set(names)) < len(names) or "unsteered" in names:
        raise InputError(f"methods need different names, not {', '.join(names)}: rename a file")
    for method in methods:
        if not method.strengths or 0 in method.strengths or len(set(method.strengths)) < len(method.strengths):
            raise InputError(f"{method.steering.name} needs different strengths, all other than 0, which is always run")
    if len({len(method.strengths) for method in methods}) > 1:
        counts = ", ".join(f"{method.steering.name} {len(method.strengths)}" for method in methods)
        raise InputError(f"every method needs the same budget: give all of them equally many strengths ({counts})")


def compare(
    model: Recorder,
    task: Task,
    methods: Sequence[Contender],
    *,
    folder: str | PathLike[str] | None = None,
    loading: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run the task for every method.

    Args:
        model, task, loading, progress: see `evaluate`.
        methods: see `check_budgets`.
        folder: the folder for each method's rows, in a file `output_name`; rows that are there are not run again.

    Raises:
        InputError: see `check_budgets` and `evaluate`.
    """
    check_budgets(methods)
    for method in methods:
        method.steering.controller.check_model(model)

    def run(steering: NamedSteering | None, strengths: Sequence[float]) -> Evaluation:
        output = Path(folder) / output_name(task, steering) if folder is not None else None
        return evaluate(model, task, steering, strengths, output=output, loading=loading, progress=progress)

    reference = run(None, (0.0,))
    results = {method.steering.name: run(method.steering, method.strengths).results(reference) for method in methods}
    rows = sum(len(part) for part in task.parts)
    return Comparison(task.name, reference.results()[0], results, len(methods[0].strengths), rows)


def output_name(task: Task, steering: NamedSteering | None) -> str:
    """The file name of a method's rows."""
    return f"{task.name}-{steering.name if steering is not None else 'unsteered'}.jsonl"
