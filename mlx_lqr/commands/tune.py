"""mlx-lqr tune"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from mlx_lqr.backends.protocol import Differentiable, Progress
from mlx_lqr.commands.fit import contrast_prompts, note_prompts, say_how_to_use
from mlx_lqr.commands.help import MEASURING, SEARCH, Decorator, Group, option
from mlx_lqr.commands.method_options import MethodChoice, MethodCommand, method_choice
from mlx_lqr.commands.options import contrast_options, output_option, tradeoff_options
from mlx_lqr.commands.output import say
from mlx_lqr.commands.progress import going_on_later, progress_bars
from mlx_lqr.commands.tables import cell, show_table
from mlx_lqr.commands.task_options import Request, add_tasks
from mlx_lqr.commands.values import parse_numbers
from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import check_writable
from mlx_lqr.files.locks import locked
from mlx_lqr.files.results import as_json
from mlx_lqr.launched import refuse_several
from mlx_lqr.loading import able_to_fit
from mlx_lqr.lqr.concept_prompts import framed
from mlx_lqr.lqr.linearize import Jacobians, linearize
from mlx_lqr.lqr.prompts import Prompt
from mlx_lqr.tasks.records import digest
from mlx_lqr.tasks.spaces import baseline_space
from mlx_lqr.tasks.tuning import DAMAGE, Trial, Tuned, check_limit, tune


@click.group("tune", cls=Group)
def tuning() -> None:
    """Find the best options and strength.

    Those that control most within a limit on damage, in a handful of evaluations. The best is written as a controller
    file with its strength, which chat and generate then take; every evaluation is kept in a folder beside it. If it is
    interrupted, the same command goes on. Options of the method that are given are held fixed and not searched.

    Tune on other rows than those you report: the concept task has openings of its own for it.
    """


def _run(
    request: Callable[..., Request],
    concept: str | None,
    positive: str | None,
    negative: str | None,
    chat_prompts: bool | None,
    strengths: str | None,
    control: str | None,
    damage: str,
    at_most: float | None,
    evaluations: int,
) -> None:
    refuse_several("tune works, with all that it keeps in files,")
    choice = method_choice()
    name, positive_prompts, negative_prompts = contrast_prompts(concept, positive, negative)
    wanted: Request = request(concepts=[name])
    unjudged = wanted.check()
    limit = check_limit(unjudged, control or unjudged.control, damage, at_most)
    between = _between(strengths)
    check_writable(wanted.output, "controller", force=wanted.force)
    folder = wanted.output.with_name(f"{wanted.output.stem}-tuning")
    with locked(wanted.output), locked(folder), going_on_later(), progress_bars() as progress:
        model, task = wanted.load(progress)
        prompts = framed(model, (positive_prompts, negative_prompts), chat_prompts)
        able = able_to_fit(model, progress=progress)
        space = baseline_space(
            able,
            choice.method.name,
            *prompts,
            concept=name,
            layers=choice.layers,
            positions=choice.positions,
            options=_with_jacobians(choice, able, prompts[0], folder, progress),
            strengths=between,
            progress=progress,
        )
        tuned = tune(
            model,
            task,
            space,
            control=control,
            damage=damage,
            limit=limit,
            evaluations=evaluations,
            folder=folder,
            loading=wanted.recorded_loading(),
            progress=progress,
        )
        if tuned.steering is not None:
            tuned.steering.save(wanted.output, force=wanted.force)
    note_prompts(model, positive_prompts, negative_prompts)
    _report(tuned, wanted, folder)
    if tuned.best is None:
        raise InputError(_nothing_found(tuned, folder))


def _with_jacobians(
    choice: MethodChoice, model: Differentiable, positive: Sequence[Prompt], folder: Path, progress: Progress
) -> dict[str, Any]:
    """The options, with Jacobians where the method takes some: computed once for all candidates, and kept in the folder
    for when the command is run again."""
    complete = choice.method.complete(choice.options)
    if "jacobians" not in complete or complete["jacobians"] is not None:
        return choice.options
    prompts = positive[: complete["jacobian_prompts"]]
    file = folder / f"jacobians-{digest([model.fingerprint, list(prompts)])}.safetensors"
    stored = Jacobians.load(file) if file.is_file() else linearize(model, prompts, store=file, progress=progress)
    return {**choice.options, "jacobians": stored}


def _between(strengths: str | None) -> tuple[float, float] | None:
    if strengths is None:
        return None
    ends = parse_numbers(strengths, "strengths")
    if len(ends) != 2 or ends[0] == ends[1]:
        raise InputError(f"--strengths must be two different numbers such as 0,6, not {strengths!r}")
    return ends[0], ends[1]


def _report(tuned: Tuned, wanted: Request, folder: Path) -> None:
    if wanted.as_json:
        fields = {
            "task": wanted.task_name,
            "control": tuned.control,
            "damage": tuned.damage,
            "limit": tuned.limit,
            "judge": wanted.judge_name,
            "unsteered": tuned.unsteered.metrics,
            "trials": tuned.trials,
            "best": tuned.best,
            "file": str(wanted.output) if tuned.best is not None else None,
        }
        say(json.dumps(as_json(fields)))
        return
    _table(tuned)
    is_ratio = DAMAGE[tuned.damage].ratio
    relative = f"{tuned.damage} times" if is_ratio else f"how much worse {tuned.damage} is than"
    judged = f"; perplexity under {wanted.judge_name}" if "perplexity" in (tuned.damage, tuned.control) else ""
    say(
        f"relative: {relative} the unsteered model's, at most {tuned.limit:g} allowed (* within). 95 % bootstrap "
        f"intervals{judged}"
    )
    say(f"All evaluations are in {folder}")
    if tuned.best is not None and tuned.steering is not None:
        say(f"Recommended: {tuned.best.candidate}, strength {tuned.best.strength:g}")
        say_how_to_use(wanted.model, str(wanted.output), tuned.steering)


def _table(tuned: Tuned) -> None:
    names = list(tuned.trials[0].options)
    control, damage = (cell(tuned.unsteered.metrics[metric]) for metric in (tuned.control, tuned.damage))
    unsteered = ["unsteered", *[""] * len(names), "0", control, damage, "", ""]
    show_table(
        ["trial", *names, "strength", tuned.control, tuned.damage, "relative", ""],
        [unsteered, *(_row(tuned, number, trial) for number, trial in enumerate(tuned.trials, 1))],
    )


def _row(tuned: Tuned, number: int, trial: Trial) -> list[str]:
    values = [f"{value:g}" if isinstance(value, float) else str(value) for value in trial.options.values()]
    mark = "best" if trial is tuned.best else "*" if trial.within else "repeats" if trial.repeats else ""
    estimates = [cell(trial.control), cell(trial.damage), f"{trial.relative:.2f}"]
    return [str(number), *values, f"{trial.strength:g}", *estimates, mark]


def _nothing_found(tuned: Tuned, folder: Path) -> str:
    if any(trial.within for trial in tuned.trials):
        unsteered = tuned.unsteered.metrics[tuned.control].value
        return (
            f"no trial within the limit ({tuned.damage}, {tuned.limit:g}) has more {tuned.control} than the unsteered "
            f"model ({unsteered:g}), so that nothing is recommended or written: try stronger --strengths, a wider "
            f"--at-most or more rows (what was measured is in {folder})"
        )
    return (
        f"no trial was within the limit ({tuned.damage}, {tuned.limit:g}), so that nothing is recommended or written: "
        f"allow more with --at-most, or more --evaluations (what was measured is in {folder})"
    )


def _options() -> tuple[Decorator, ...]:
    limits = ", ".join(f"{name} {damage.limit:g}" for name, damage in DAMAGE.items())
    return (
        contrast_options,
        option(
            "--strengths",
            metavar="MILD,STRONG",
            heading=SEARCH,
            help="From no steering to the strongest to try; 0,-6 for the opposite of the concept. By default what is "
            "sensible for the method, 0,6 for alqr.",
        ),
        option(
            "--evaluations",
            type=click.IntRange(min=1),
            default=16,
            heading=SEARCH,
            help="How many settings to run, besides the unsteered model.",
        ),
        tradeoff_options(list(DAMAGE), "What is to be high"),
        option(
            "--at-most",
            type=float,
            metavar="LIMIT",
            heading=MEASURING,
            help="Of the damage: perplexity, this many times the unsteered model's; the others, so much worse than it. "
            f"By default {limits}.",
        ),
    )


add_tasks(
    tuning,
    _run,
    _options(),
    output=output_option("The controller file to write; FILE-tuning, a folder beside it, keeps all that was measured."),
    purpose="tuning",
    cls=MethodCommand,
)
