"""mlx-lqr tune"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlx_lqr.backends.protocol import Model, Progress
from mlx_lqr.commands.fit import contrast_prompts, note_few_prompts, say_how_to_use
from mlx_lqr.commands.options import output_option
from mlx_lqr.commands.progress import going_on_later, progress_bars
from mlx_lqr.commands.tables import cell, show_table
from mlx_lqr.commands.task_options import Request, add_tasks
from mlx_lqr.commands.values import parse_strengths
from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import check_writable
from mlx_lqr.files.results import as_json
from mlx_lqr.lqr.contrast import contrast
from mlx_lqr.lqr.controller import Positions
from mlx_lqr.lqr.linearize import Jacobians, linearize
from mlx_lqr.methods.baseline import METHODS, known_method
from mlx_lqr.tasks.concept import bundled_openings
from mlx_lqr.tasks.records import digest
from mlx_lqr.tasks.spaces import STRENGTHS, alqr_space, baseline_space
from mlx_lqr.tasks.tuning import DAMAGE, Trial, Tuned, check_limit, tune


@click.group("tune")
def tuning() -> None:
    """Find the best options and strength.

    Those that control most within a limit on damage, in a handful of evaluations. The best is written as a controller
    file with its strength, which chat and generate then take; every evaluation is kept in a folder beside it. If it is
    interrupted, the same command goes on.

    Tune on other rows than those you report: the concept task has openings of its own for it.
    """


def _run(
    request: Callable[..., Request],
    method: str,
    concept: str | None,
    positive: str | None,
    negative: str | None,
    jacobians: str | None,
    jacobian_prompts: int,
    positions: Positions | None,
    strengths: str | None,
    control: str | None,
    damage: str,
    at_most: float | None,
    evaluations: int,
) -> None:
    name, positive_prompts, negative_prompts = contrast_prompts(concept, positive, negative)
    wanted: Request = request(concepts=[name])
    unjudged = wanted.check()
    limit = check_limit(unjudged, control or unjudged.control, damage, at_most)
    between = _between(strengths)
    known = known_method(method)
    if known is not None and jacobians is not None:
        raise InputError(f"--jacobians is not for the method {method}: leave it out")
    if jacobian_prompts < 1:
        raise InputError("--jacobian-prompts must be at least 1")
    stored = Jacobians.load(jacobians) if jacobians is not None else None
    check_writable(wanted.output, "controller", force=wanted.force)
    folder = wanted.output.with_name(f"{wanted.output.stem}-tuning")
    with going_on_later(), progress_bars() as progress:
        model, task = wanted.load(progress)
        if known is not None:
            space = baseline_space(
                model,
                known,
                positive_prompts,
                negative_prompts,
                concept=name,
                positions=positions,
                strengths=between,
            )
        else:
            found = contrast(model, positive_prompts, negative_prompts, progress=progress)
            stored = stored or _jacobians(model, positive_prompts[:jacobian_prompts], folder, progress)
            space = alqr_space(
                model, found, stored, concept=name, positions=positions or "last", strengths=between or STRENGTHS
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
            loading=wanted.recorded_loading,
            progress=progress,
        )
    if tuned.steering is not None:
        tuned.steering.save(wanted.output, force=wanted.force)
    note_few_prompts(positive_prompts, negative_prompts)
    _report(tuned, wanted, folder)
    if tuned.best is None:
        raise InputError(_nothing_found(tuned, folder))


def _between(strengths: str | None) -> tuple[float, float] | None:
    if strengths is None:
        return None
    found = parse_strengths(strengths)
    if len(found) != 2 or found[0] == found[1]:
        raise InputError(f"--strengths must be two different numbers such as 0,6, not {strengths!r}")
    return found[0], found[1]


def _jacobians(model: Model, prompts: list[str], folder: Path, progress: Progress) -> Jacobians:
    """Those at these prompts, computed once and kept in the folder."""
    file = folder / f"jacobians-{digest([model.fingerprint, prompts])}.safetensors"
    if file.is_file():
        return Jacobians.load(file)
    return linearize(model, prompts, store=file, progress=progress)


def _report(tuned: Tuned, wanted: Request, folder: Path) -> None:
    if wanted.as_json:
        found = {
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
        click.echo(json.dumps(as_json(found)))
        return
    _table(tuned)
    kind = "times" if DAMAGE[tuned.damage].ratio else "worse by"
    click.echo(
        f"relative: {tuned.damage} {kind} the unsteered model's, at most {tuned.limit:g} allowed (* within). 95 % "
        f"bootstrap intervals; perplexity under {wanted.judge_name}"
    )
    click.echo(f"All evaluations are in {folder}")
    if tuned.best is not None:
        click.echo(f"Recommended: {tuned.best.candidate}, strength {tuned.best.strength:g}")
        say_how_to_use(wanted.model, str(wanted.output), None)


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
    found = [cell(trial.control), cell(trial.damage), f"{trial.relative:.2f}"]
    return [str(number), *values, f"{trial.strength:g}", *found, mark]


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


def _options() -> tuple[Callable[[Any], Any], ...]:
    limits = ", ".join(f"{name} {damage.limit:g}" for name, damage in DAMAGE.items())
    return (
        click.option(
            "--method",
            type=click.Choice(["alqr", *METHODS]),
            default="alqr",
            show_default=True,
            help="Activation LQR, or a method that it is compared with.",
        ),
        click.option("--concept", help="A bundled contrast set (see `mlx-lqr concepts`), or the name of your own."),
        click.option("--positive", type=click.Path(), help="Prompts with the concept, as for `mlx-lqr fit`."),
        click.option("--negative", type=click.Path(), help="Prompts without it."),
        click.option("--jacobians", type=click.Path(), help="Jacobians stored by `mlx-lqr linearize`."),
        click.option(
            "--jacobian-prompts",
            default=8,
            show_default=True,
            help="Positive prompts to linearise at, where not stored.",
        ),
        click.option("--positions", type=click.Choice(["last", "all"]), help="As for `mlx-lqr fit`; not searched."),
        click.option(
            "--strengths",
            metavar="MILD,STRONG",
            help="From no steering to the strongest to try; 0,-6 for the opposite of the concept. By default 0,6 for "
            "alqr, and what is sensible for the others.",
        ),
        click.option("--control", metavar="METRIC", help="What is to be high; by default what the task is about."),
        click.option("--damage", type=click.Choice(list(DAMAGE)), default="perplexity", show_default=True),
        click.option(
            "--at-most",
            type=float,
            metavar="LIMIT",
            help="Of the damage: perplexity, this many times the unsteered model's; the others, so much worse than it. "
            f"By default {limits}.",
        ),
        click.option(
            "--evaluations",
            type=click.IntRange(min=1),
            default=16,
            show_default=True,
            help="How many settings to run, besides the unsteered model.",
        ),
    )


add_tasks(
    tuning,
    _run,
    _options(),
    output=output_option("The controller file to write; FILE-tuning, a folder beside it, keeps all that was measured."),
    openings=bundled_openings("tuning"),
)
