"""mlx-lqr eval lm-eval"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from mlx_lqr.commands.evaluate import parse_steering, steering_options
from mlx_lqr.commands.options import (
    Loading,
    force_option,
    going_on_later,
    loading_options,
    model_argument,
    parse_strengths,
    progress_bars,
)
from mlx_lqr.commands.tables import show_table
from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import check_writable
from mlx_lqr.files.results import as_json, write_json
from mlx_lqr.tasks.lm_eval import LMEvaluation, Settings, evaluate, load_evaluator, load_tasks

_controller, _strengths = steering_options


@click.command("lm-eval")
@model_argument
@_controller
@_strengths
@click.option("--tasks", "names", required=True, metavar="NAMES", help="lm-eval's, or your own: arc_easy,hellaswag")
@click.option("--include-path", type=click.Path(), metavar="DIR", help="A folder of tasks of your own, as YAML files.")
@click.option("-o", "--output", required=True, type=click.Path(), help="A folder; interrupted, a run goes on.")
@click.option("--limit", type=click.IntRange(min=1), help="Take only so many documents of each task.")
@click.option("--num-shots", type=click.IntRange(min=0), help="Solved examples before a question, if not the task's.")
@click.option(
    "--apply-chat-template/--no-apply-chat-template",
    default=None,
    help="Put prompts into the model's chat template; by default where it has one.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Texts side by side.")
@click.option("-n", "--max-tokens", type=click.IntRange(min=1), help="Of each text, at most, if not the task's.")
@click.option("--seed", default=Settings.seed, show_default=True, help="For the choice of solved examples.")
@click.option("--confirm-run-unsafe-code", is_flag=True, help="Allow tasks that run the code that the model writes.")
@force_option
@click.option("--json", "as_json_text", is_flag=True, help="All numbers to stdout, for scripts.")
@loading_options
def lm_eval(
    model: str,
    controllers: tuple[str, ...],
    strengths: str,
    names: str,
    include_path: str | None,
    output: str,
    apply_chat_template: bool | None,
    batch_size: int,
    max_tokens: int | None,
    as_json_text: bool,
    force: bool,
    loading: Loading,
    **settings: Any,
) -> None:
    """Run tasks of lm-eval (the lm-evaluation-harness) through mlx-lm's evaluator, steered.

    Of a context the last token is steered, and everything after it. This needs the extra lm-eval, and MLX.
    """
    if loading["backend"] == "torch" or loading["device"] is not None:
        raise InputError("lm-eval's tasks run through mlx-lm's evaluator, which has no torch: use --backend mlx")
    chosen = parse_strengths(strengths)
    steering = parse_steering(controllers)
    file = Path(output) / f"lm-eval-{steering.name if steering is not None else 'unsteered'}.jsonl"
    tasks = load_tasks([name.strip() for name in names.split(",") if name.strip()], include_path)
    check_writable(file.with_suffix(".summary.json"), "results", force=force)
    with progress_bars() as progress:
        evaluator = load_evaluator(
            model,
            dtype=loading["dtype"],
            batch_size=batch_size,
            max_tokens=max_tokens,
            apply_chat_template=apply_chat_template,
            progress=progress,
        )
    with going_on_later():
        found = evaluate(
            evaluator,
            tasks,
            steering,
            [0.0, *chosen] if steering is not None else [0.0],
            settings=Settings(**settings),
            output=file,
            progress=_announce,
        )
    summary = _summary(found)
    write_json(file.with_suffix(".summary.json"), summary, force=force)
    if as_json_text:
        click.echo(json.dumps(as_json(summary)))
        return
    head = [f"strength {strength:g}" if strength else "unsteered" for strength in found.results]
    show_table(["lm-eval", *head], list(_rows(found)))
    click.echo("with the standard errors that lm-eval gives")
    click.echo(f"Wrote {file} and {file.with_suffix('.summary.json').name}")


def _announce(stage: str, done: int, total: int) -> None:
    """A line for each task, since mlx-lm has progress bars of its own."""
    click.echo(f"{stage} ({done + 1} of {total})", err=True)


def _summary(found: LMEvaluation) -> dict[str, Any]:
    strengths = [{"strength": strength, "results": results} for strength, results in found.results.items()]
    return {"method": found.method, **found.header, "strengths": strengths}


def _rows(found: LMEvaluation) -> Iterator[list[str]]:
    """A row for each metric of each task: its name, and its value at each strength."""
    for task, entry in next(iter(found.results.values())).items():
        for key in entry:
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            name = f"{task} {metric}" if filter_name == "none" else f"{task} {metric} ({filter_name})"
            error = f"{metric}_stderr,{filter_name}"
            yield [name, *(_cell(results[task][key], results[task].get(error)) for results in found.results.values())]


def _cell(value: Any, error: Any) -> str:
    if not isinstance(value, float | int):
        return "-"
    return f"{value:.3g} ± {error:.2g}" if isinstance(error, float | int) else f"{value:.3g}"
