"""mlx-lqr eval lm-eval: tasks of the lm-evaluation-harness on a steered model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from mlx_lqr.commands.evaluate import say_shares, steering_options
from mlx_lqr.commands.help import TASK, command, option, together
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
)
from mlx_lqr.commands.output import say
from mlx_lqr.commands.progress import going_on_later, progress_bars
from mlx_lqr.commands.sweep import sweep
from mlx_lqr.commands.tables import show_table
from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import reserved
from mlx_lqr.files.locks import locked
from mlx_lqr.files.results import as_json as to_json
from mlx_lqr.files.results import write_json
from mlx_lqr.launched import refuse_several
from mlx_lqr.runtime.arguments import Asked, ControllerChoice
from mlx_lqr.tasks.lm_eval import LMEvaluation, Settings, evaluate, load_evaluator, load_tasks


@command("lm-eval")
@model_argument
@together(*steering_options)
@option(
    "--tasks",
    "names",
    required=True,
    metavar="NAMES",
    heading=TASK,
    help="Tasks of lm-eval, or your own: arc_easy,hellaswag",
)
@option(
    "--include-path",
    type=click.Path(),
    metavar="DIR",
    heading=TASK,
    help="A folder with tasks of your own, as YAML files.",
)
@option(
    "--num-shots",
    type=click.IntRange(min=0),
    heading=TASK,
    help="Solved examples before each question; by default what the task says.",
)
@option(
    "--apply-chat-template/--no-apply-chat-template",
    default=None,
    heading=TASK,
    help="Put prompts into the model's chat template; by default if it has one.",
)
@option(
    "--confirm-run-unsafe-code",
    is_flag=True,
    heading=TASK,
    help="Allow tasks that run code written by the model.",
)
@option("--batch-size", type=click.IntRange(min=1), default=8, heading=TASK, help="Texts that run side by side.")
@limit_option("Take only this many documents of each task.")
@seed_option("For the choice of solved examples.", Settings.seed)
@max_tokens_option(None, "At most this many tokens a text; by default what the task says.", type=click.IntRange(min=1))
@output_option("A folder; if a run is interrupted, it goes on from there.", metavar="FOLDER")
@force_option
@json_option()
@loading_options
def lm_eval(
    model: str,
    controllers: tuple[ControllerChoice, ...],
    strengths: list[Asked] | None,
    shares: list[float] | None,
    names: str,
    include_path: str | None,
    output: str,
    apply_chat_template: bool | None,
    batch_size: int,
    max_tokens: int | None,
    as_json: bool,
    force: bool,
    loading: Loading,
    **settings: Any,
) -> None:
    """Run tasks of the lm-evaluation-harness.

    They run through mlx-lm's evaluator, steered from the last token of each context on. This needs MLX, and the extra
    lm-eval: pip install 'mlx-lqr[lm-eval]'.
    """
    refuse_several("lm-eval runs")
    if loading["backend"] == "torch" or loading["device"] is not None:
        raise InputError("lm-eval's tasks run through mlx-lm's evaluator, which has no torch: use --backend mlx")
    steering, chosen = sweep(controllers, strengths, shares)
    file = Path(output) / f"lm-eval-{steering.name if steering is not None else 'unsteered'}.jsonl"
    tasks = load_tasks([name.strip() for name in names.split(",") if name.strip()], include_path)
    summary_file = file.with_suffix(".summary.json")
    with reserved(summary_file, "results", force=force), locked(file):
        with progress_bars() as progress:
            evaluator = load_evaluator(
                model,
                dtype=loading["dtype"],
                adapter=loading["adapter"],
                batch_size=batch_size,
                max_tokens=max_tokens,
                apply_chat_template=apply_chat_template,
                progress=progress,
            )
        with going_on_later():
            evaluation = evaluate(
                evaluator,
                tasks,
                steering,
                [0.0, *chosen],
                settings=Settings(**settings),
                output=file,
                progress=_announce,
            )
        summary = _summary(evaluation)
        write_json(summary_file, summary, force=force)
    if as_json:
        say(json.dumps(to_json(summary)))
        return
    head = [f"strength {strength:g}" if strength else "unsteered" for strength in evaluation.results]
    show_table(["lm-eval", *head], list(_rows(evaluation)))
    say("with the standard errors that lm-eval gives")
    say_shares(steering)
    say(f"Wrote {file} and {summary_file.name}")


def _announce(stage: str, done: int, total: int) -> None:
    """A line for each task: mlx-lm shows progress bars of its own."""
    say(f"{stage} ({done + 1} of {total})", err=True)


def _summary(evaluation: LMEvaluation) -> dict[str, Any]:
    strengths = [{"strength": strength, "results": results} for strength, results in evaluation.results.items()]
    return {"method": evaluation.method, **evaluation.header, "strengths": strengths}


def _rows(evaluation: LMEvaluation) -> Iterator[list[str]]:
    """A row for each metric of each task: its name, and its value at each strength."""
    for task, entry in next(iter(evaluation.results.values())).items():
        for key in entry:
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            name = f"{task} {metric}" if filter_name == "none" else f"{task} {metric} ({filter_name})"
            error = f"{metric}_stderr,{filter_name}"
            yield [
                name,
                *(_cell(results[task][key], results[task].get(error)) for results in evaluation.results.values()),
            ]


def _cell(value: Any, error: Any) -> str:
    if not isinstance(value, float | int):
        return "-"
    return f"{value:.3g} ± {error:.2g}" if isinstance(error, float | int) else f"{value:.3g}"
