"""mlx-lqr compare: several controllers on one task and the same budget, as a table, numbers and a plot."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence

import click

from mlx_lqr.commands.help import Group
from mlx_lqr.commands.options import controller_option, strengths_option, tradeoff_options
from mlx_lqr.commands.output import say
from mlx_lqr.commands.progress import going_on_later, progress_bars
from mlx_lqr.commands.sweep import at_strengths, refuse_unused
from mlx_lqr.commands.tables import cell, show_table
from mlx_lqr.commands.task_options import Request, add_tasks
from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import reserved
from mlx_lqr.files.results import as_json, write_json
from mlx_lqr.launched import refuse_several
from mlx_lqr.runtime.arguments import Asked, ControllerChoice
from mlx_lqr.tasks import Task, named_steering
from mlx_lqr.tasks.compare import Comparison, Contender, check_budgets
from mlx_lqr.tasks.compare import compare as compare_methods

DAMAGE = {
    "perplexity": "perplexity under {judge}",
    "kl": "KL to the unsteered model on neutral text (nats)",
    "repetition": "share of repeated 4-grams",
}
COLUMNS = ("perplexity", "distinct_2", "repetition", "kl", "capability", "accuracy")
"""Metrics in the table, of those that a task has."""


@click.group("compare", cls=Group)
def compare_group() -> None:
    """Compare controllers on the same task.

    Each runs at as many strengths as the others; a table with intervals and a plot come out. What `mlx-lqr eval` or an
    earlier comparison has left in the output folder is not run again if the settings are the same.
    """


def _methods(controllers: Sequence[ControllerChoice], strengths: list[Asked] | None) -> list[Contender]:
    refuse_unused(controllers, strengths)
    methods = []
    for choice in controllers:
        named = named_steering([(choice.file, 1.0)])
        methods.append(Contender(*at_strengths(named, [named.controller], choice.strengths or strengths)))
    return methods


def _run(
    request: Callable[..., Request],
    controllers: tuple[ControllerChoice, ...],
    strengths: list[Asked] | None,
    control: str | None,
    damage: str,
) -> None:
    refuse_several("compare works, with all that it keeps in files,")
    methods = _methods(controllers, strengths)
    check_budgets(methods)
    wanted: Request = request(concepts=[name for method in methods for name in method.steering.controller.concepts])
    names = wanted.check().metric_names
    if control is not None and control not in names:
        raise InputError(f"{wanted.task_name} does not measure {control}: choose one of {', '.join(names)}")
    name = f"{wanted.task_name}-comparison"
    file = wanted.output / f"{name}.json"
    with reserved(file, "results", force=wanted.force), going_on_later(), progress_bars() as progress:
        steerings = [method.steering.controller for method in methods]
        model, task = wanted.load(progress, steerings)
        comparison = compare_methods(
            model, task, methods, folder=wanted.output, loading=wanted.recorded_loading(steerings), progress=progress
        )
        numbers = {**as_json(comparison), "budget": comparison.budget, "judge": wanted.judge_name}
        write_json(file, numbers, force=wanted.force)
    control = control or task.control
    if importlib.util.find_spec("matplotlib") is None:
        say("Note: the plot needs matplotlib: pip install 'mlx-lqr[plots]', then run this again", err=True)
    else:
        label = task.control_label if control == task.control else control.replace("_", " ")
        _plot(comparison, control, label, damage, DAMAGE[damage].format(judge=wanted.judge_name), wanted)
    if wanted.as_json:
        say(json.dumps(numbers))
        return
    _table(comparison, task, control)
    say(f"with 95 % bootstrap intervals over prompts; perplexity under {wanted.judge_name}")
    say(comparison.budget)
    say(f"Wrote {wanted.output / name}.json")


def _table(comparison: Comparison, task: Task, control: str) -> None:
    rows = [("unsteered", comparison.unsteered)]
    rows += [(method, result) for method, results in comparison.methods.items() for result in results]
    columns = [name for name in dict.fromkeys((control, task.control, *COLUMNS)) if name in task.metric_names]
    show_table(
        [task.name, "strength", *columns],
        [
            [method, f"{result.strength:g}", *(cell(result.metrics[column]) for column in columns)]
            for method, result in rows
        ],
    )


def _plot(
    comparison: Comparison, control: str, control_label: str, damage: str, damage_label: str, wanted: Request
) -> None:
    from mlx_lqr.analysis import plots

    points = []
    for method, results in comparison.methods.items():
        for result in (comparison.unsteered, *results):
            good, bad = result.metrics[control], result.metrics[damage]
            intervals = (good.low, good.high), (bad.low, bad.high)
            points.append(plots.Tradeoff(method, result.strength, good.value, bad.value, *intervals))
    figure = plots.control_against_damage(points, control_label, damage_label)
    plots.save_all({f"{wanted.task_name}-comparison": figure}, wanted.output, force=wanted.force)


add_tasks(
    compare_group,
    _run,
    (
        controller_option(
            swept=True,
            required=True,
            several_strengths=True,
            repeat="Repeat it for each method to compare. FILE:1,2,3 gives one its own list, as long as the others'.",
        ),
        strengths_option,
        tradeoff_options(tuple(DAMAGE), "What to show in the table and the plot"),
    ),
)
