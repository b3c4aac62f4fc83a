"""mlx-lqr eval"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from mlx_lqr.commands.options import going_on_later, parse_strengths, progress_bars
from mlx_lqr.commands.tables import cell, show_table
from mlx_lqr.commands.task_options import Request, add_tasks
from mlx_lqr.files.atomic import check_writable
from mlx_lqr.files.results import as_json, write_json
from mlx_lqr.runtime.arguments import parse_strength, split_file
from mlx_lqr.tasks import Evaluation, Steering, evaluate, load_steering
from mlx_lqr.tasks.compare import output_name

steering_options = (
    click.option(
        "-c",
        "--controller",
        "controllers",
        multiple=True,
        metavar="FILE[:SHARE]",
        help="Steer with this; repeat it to steer with several at once, each at SHARE (1) times the strength. "
        "Without any, the unsteered model alone is measured.",
    ),
    click.option("--strengths", default="1,2,3", show_default=True, help="At which to steer, besides 0."),
)


@click.group("eval")
def evaluation() -> None:
    """Measure what a controller does on a task, and what it costs, at several strengths.

    Strength 0 is the unsteered model and is always included. Perplexity of the texts, distinct-n, repetition, KL on
    neutral text and a capability set are measured with every task but lm-eval's. Interrupted, the same command goes on.
    """


def parse_steering(controllers: tuple[str, ...]) -> Steering | None:
    """All the -c options, FILE[:SHARE], as one."""
    parts = [split_file(text) for text in controllers]
    if not parts:
        return None
    return load_steering([(file, 1.0 if share is None else parse_strength(share)) for file, share in parts])


def _run(request: Callable[..., Request], controllers: tuple[str, ...], strengths: str) -> None:
    chosen = parse_strengths(strengths)
    steering = parse_steering(controllers)
    wanted: Request = request(concepts=steering.controller.concepts if steering is not None else ())
    wanted.check()
    if steering is None:
        chosen = [0.0]
    summary_file = (wanted.output / output_name(wanted.check(), steering)).with_suffix(".summary.json")
    check_writable(summary_file, "results", force=wanted.force)
    with going_on_later(), progress_bars() as progress:
        model, task = wanted.load(progress)
        file = wanted.output / output_name(task, steering)
        found = evaluate(
            model,
            task,
            steering,
            [0.0, *chosen],
            output=file,
            loading=wanted.recorded_loading,
            progress=progress,
        )
    summary = _summary(found)
    write_json(summary_file, summary, force=wanted.force)
    if wanted.as_json:
        click.echo(json.dumps(as_json(summary)))
        return
    results = found.results()
    head = [task.name, *(f"strength {result.strength:g}" if result.strength else "unsteered" for result in results)]
    show_table(head, [[name, *(cell(result.metrics[name]) for result in results)] for name in results[0].metrics])
    click.echo(f"with 95 % bootstrap intervals over prompts; perplexity under {wanted.judge_name}")
    click.echo(f"Wrote {file} and {summary_file.name}")


def _summary(found: Evaluation) -> dict[str, Any]:
    return {"method": found.method, "control": found.task.control, **found.header, "strengths": found.results()}


add_tasks(evaluation, _run, steering_options)
