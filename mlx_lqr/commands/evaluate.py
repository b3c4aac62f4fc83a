"""mlx-lqr eval: a task at several strengths of one steering, every number with its interval."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from mlx_lqr.commands.help import Group
from mlx_lqr.commands.options import controller_option, strengths_option
from mlx_lqr.commands.output import say
from mlx_lqr.commands.progress import going_on_later, progress_bars
from mlx_lqr.commands.sweep import shares_option, sweep
from mlx_lqr.commands.tables import cell, show_table
from mlx_lqr.commands.task_options import Request, add_tasks
from mlx_lqr.files.atomic import reserved
from mlx_lqr.files.locks import locked
from mlx_lqr.files.results import as_json, write_json
from mlx_lqr.runtime.arguments import Asked, ControllerChoice
from mlx_lqr.tasks import Evaluation, NamedSteering, evaluate
from mlx_lqr.tasks.compare import output_name

steering_options = (
    controller_option(swept=True, repeat="Repeat it for several at once; with none, the unsteered model is measured."),
    strengths_option,
    shares_option,
)


@click.group("eval", cls=Group)
def eval_group() -> None:
    """Measure what steering does and costs.

    Strength 0 is the unsteered model and is always included. Every task but lm-eval's also measures the perplexity of
    the texts, distinct-n, repetition, KL on neutral text, and answers to a set of questions. If it is interrupted, the
    same command goes on.
    """


def _run(
    request: Callable[..., Request],
    controllers: tuple[ControllerChoice, ...],
    strengths: list[Asked] | None,
    shares: list[float] | None,
) -> None:
    steering, chosen = sweep(controllers, strengths, shares)
    wanted: Request = request(concepts=steering.controller.concepts if steering is not None else ())
    file = wanted.output / output_name(wanted.check(), steering)
    summary_file = file.with_suffix(".summary.json")
    with (
        reserved(summary_file, "results", force=wanted.force),
        locked(file),
        going_on_later(),
        progress_bars() as progress,
    ):
        steerings = () if steering is None else (steering.controller,)
        model, task = wanted.load(progress, steerings)
        evaluation = evaluate(
            model,
            task,
            steering,
            [0.0, *chosen],
            output=file,
            loading=wanted.recorded_loading(steerings),
            progress=progress,
        )
        summary = _summary(evaluation)
        write_json(summary_file, summary, force=wanted.force)
    if wanted.as_json:
        say(json.dumps(as_json(summary)))
        return
    results = evaluation.results()
    head = [task.name, *(f"strength {result.strength:g}" if result.strength else "unsteered" for result in results)]
    show_table(head, [[name, *(cell(result.metrics[name]) for result in results)] for name in results[0].metrics])
    say(f"with 95 % bootstrap intervals over prompts; perplexity under {wanted.judge_name}")
    say_shares(steering)
    say(f"Wrote {file} and {summary_file.name}")


def say_shares(steering: NamedSteering | None) -> None:
    """A line where concepts get different shares of the strengths in a table's head."""
    if steering is not None and set(steering.shares) - {1.0}:
        shares = zip(steering.controller.concepts, steering.shares, strict=True)
        say(f"each at its share of the strength: {', '.join(f'{concept} {share:g}' for concept, share in shares)}")


def _summary(evaluation: Evaluation) -> dict[str, Any]:
    fields = {"method": evaluation.method, "control": evaluation.task.control, **evaluation.header}
    return {**fields, "strengths": evaluation.results()}


add_tasks(eval_group, _run, steering_options)
