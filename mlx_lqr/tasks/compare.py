"""Methods by strengths on one task, each with the same budget.

A budget is a number of settings: every method is run at as many strengths as any other, over the same prompts with the
same random numbers, against one unsteered run. Strengths of different methods need not be the same numbers, since they
need not mean the same. Where a method's best setting is read off these results, it is chosen on the rows it is reported
for, and looks a little better than it is; with equal budgets it does so for every method alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from mlx_lqr.backends.protocol import Model, Progress
from mlx_lqr.errors import InputError
from mlx_lqr.tasks.run import Evaluation, Result, Task, evaluate
from mlx_lqr.tasks.steering import NamedSteering


@dataclass(frozen=True, eq=False)
class Method:
    """A steering and the strengths to try it at."""

    steering: NamedSteering
    strengths: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """What was found for every method."""

    task: str
    unsteered: Result
    methods: dict[str, list[Result]]
    settings: int
    """Strengths tried of each method"""
    rows: int
    """Rows measured at each setting"""

    @property
    def budget(self) -> str:
        """The budget in a sentence."""
        tried = "; ".join(
            f"{name} at {', '.join(f'{result.strength:g}' for result in results)}"
            for name, results in self.methods.items()
        )
        settings = f"{self.settings} setting{'s' * (self.settings > 1)}"
        return f"Budget, the same for every method: {settings} of {self.rows} rows ({tried})"


def check_budgets(methods: Sequence[Method]) -> None:
    """Raise `InputError` unless methods have different names and as many strengths each, none of them 0."""
    names = [method.steering.name for method in methods]
    if not names:
        raise InputError("there is nothing to compare: give at least one controller")
    if len(set(names)) < len(names) or "unsteered" in names:
        raise InputError(f"methods need names of their own, not {', '.join(names)}: rename a file")
    for method in methods:
        if not method.strengths or 0 in method.strengths or len(set(method.strengths)) < len(method.strengths):
            raise InputError(f"{method.steering.name} needs different strengths other than 0, which is always there")
    if len({len(method.strengths) for method in methods}) > 1:
        counts = ", ".join(f"{method.steering.name} {len(method.strengths)}" for method in methods)
        raise InputError(f"every method gets the same budget: give each as many strengths as the others ({counts})")


def compare(
    model: Model,
    task: Task,
    methods: Sequence[Method],
    *,
    folder: str | PathLike[str] | None = None,
    loading: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run the task for every method.

    Args:
        model, task, loading, progress: see `evaluate`.
        methods: see `check_budgets`.
        folder: where each method's rows go, under `output_name`; what is there of the same settings is not run again.

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
    found = {method.steering.name: run(method.steering, method.strengths).results(reference) for method in methods}
    rows = sum(len(part) for part in task.parts)
    return Comparison(task.name, reference.results()[0], found, len(methods[0].strengths), rows)


def output_name(task: Task, steering: NamedSteering | None) -> str:
    """The name of a run's file in its folder."""
    return f"{task.name}-{steering.name if steering is not None else 'unsteered'}.jsonl"
