"""mlx-lqr linearize and mlx-lqr fit"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_lqr.backends.protocol import Runner
from mlx_lqr.commands.help import METHOD, OUTPUT, TEXT, command, option, together
from mlx_lqr.commands.made_prompts import made_prompts, made_prompts_options
from mlx_lqr.commands.method_options import MethodCommand, method_choice
from mlx_lqr.commands.options import (
    Loading,
    budget_option,
    contrast_options,
    force_option,
    loading_options,
    model_argument,
    output_option,
    prompts_option,
)
from mlx_lqr.commands.output import say
from mlx_lqr.commands.progress import NOTHING_WRITTEN, going_on_later, progress_bars, stopping
from mlx_lqr.concepts import bundled_prompts
from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import reserved
from mlx_lqr.files.prompts import read_prompts
from mlx_lqr.launched import rank, refuse_several
from mlx_lqr.loading import load
from mlx_lqr.lqr.concept_prompts import framed
from mlx_lqr.lqr.contrast import Contrast
from mlx_lqr.lqr.linearize import linearize as linearize_model
from mlx_lqr.lqr.prompts import Prompt
from mlx_lqr.lqr.sets import review_prompts, review_separation
from mlx_lqr.lqr.strength import Budget
from mlx_lqr.methods.calibration import recommended
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.steering import Steering


@command()
@together(
    model_argument,
    prompts_option("Nominal prompts; by default eight of the bundled neutral sentences."),
    option("--nominal", metavar="TEXT", heading=TEXT, help="Linearise at this one prompt."),
    output_option("The file to write."),
    option("--store", default="float32", heading=OUTPUT, help="float32, or float16 for half the size."),
    force_option,
    loading_options,
)
def linearize(
    model: str, output: str, prompts: str | None, nominal: str | None, store: str, force: bool, loading: Loading
) -> None:
    """Store a model's Jacobians for `fit`.

    They serve (fit --jacobians) for any concept and any weights. If it is interrupted, the same command goes on.
    """
    refuse_several("Jacobians are stored")
    if prompts is not None and nominal is not None:
        raise InputError("give --prompts FILE or --nominal TEXT, not both")
    chosen = bundled_prompts("dog")[1][:8] if nominal is None else [nominal]
    if prompts is not None:
        chosen = read_prompts(prompts)
    with reserved(output, "Jacobians", force=force), going_on_later(), progress_bars() as progress:
        loaded = load(model, **loading, progress=progress)
        jacobians = linearize_model(loaded, chosen, store=output, dtype=store, force=force, progress=progress)
    say(f"Wrote {output}: {len(jacobians)} Jacobians averaged over {jacobians.prompt_count} prompts")


@command(cls=MethodCommand)
@together(
    model_argument,
    contrast_options,
    budget_option("Which strength the file recommends; normal if not given.", heading=METHOD),
    option("--no-calibration", is_flag=True, heading=METHOD, help="Measure no strengths, and recommend none."),
    made_prompts_options,
    output_option("The controller file to write."),
    force_option,
    loading_options,
)
def fit(
    model: str,
    output: str,
    concept: str | None,
    positive: str | None,
    negative: str | None,
    budget: Budget | None,
    no_calibration: bool,
    concept_word: str | None,
    concept_style: str | None,
    save_prompts: str | None,
    chat_prompts: bool | None,
    force: bool,
    loading: Loading,
) -> None:
    """Fit a controller for a concept.

    By activation LQR, or by another --method.
    """
    if no_calibration and budget is not None:
        raise InputError(f"--no-calibration measures no strength for --budget {budget}: leave one of the two out")
    choice = method_choice()  # mistakes are refused before the model is loaded
    others = bool(concept or positive or negative)
    made = made_prompts(
        concept_word, concept_style, save_prompts, output, others=others, chat=chat_prompts, force=force
    )
    if made is None:
        name, *given = contrast_prompts(concept, positive, negative)
    else:
        name, given = made.concept, []
    contrasts: list[Contrast] = []
    with reserved(output, "controller", force=force), stopping(NOTHING_WRITTEN), progress_bars() as progress:
        loaded = load(model, **loading, progress=progress)
        texts = given if made is None else made.make(loaded)
        prompts = framed(loaded, texts, chat_prompts)
        steering = choice.method.fit_prompts(
            loaded,
            *prompts,
            choice.options,
            concept=name,
            layers=choice.layers,
            positions=choice.positions,
            progress=progress,
            on_contrast=contrasts.append,
        )
        if not no_calibration:
            steering, doubts = recommended(loaded, steering, budget or "normal", prompts, progress)
            for doubt in doubts:
                say(f"Note: {doubt}", err=True)
        steering.save(output, force=force)
        if made is not None:
            made.save(texts)
    note_prompts(loaded, *texts)
    note_separation(contrasts, steering.active_layers)
    say_how_to_use(model, output, steering)


def note_prompts(model: Runner, positive: Sequence[Prompt], negative: Sequence[Prompt]) -> None:
    """Say what the sets differ in besides the concept."""
    if rank() == 0:
        for finding in review_prompts(model, positive, negative):
            say(f"Note: {finding}", err=True)


def note_separation(contrasts: Sequence[Contrast], layers: Sequence[int]) -> None:
    """Say so where the direction tells held-out prompts apart at none of the layers."""
    for contrast in contrasts if rank() == 0 else ():
        if (finding := review_separation(contrast, layers)) is not None:
            say(f"Note: {finding}", err=True)


def say_how_to_use(model: str, output: str, steering: Steering) -> None:
    """A command to go on with, and the strength at which it steers."""
    if rank() > 0:  # the file is on the first machine
        return
    size = f"{Path(output).stat().st_size / 1000:.0f} kB"
    recommends = ""
    if steering.strength is not None:
        numbers = ", ".join(f"{strength:g}" for strength in steering.strength)
        recommends = f" It recommends strength {numbers}; {output}:1.5x is stronger, {output}:0.5x milder."
    say(f"Wrote {output} ({size}).{recommends} Try it:")
    say(f"  mlx-lqr generate {model} -p 'Once upon a time,' -c {to_try(output, steering)}")


def to_try(file: str, steering: Steering) -> str:
    """What to write after -c: the file, which recommends a strength, or else one worth a first try."""
    return file if steering.strength is not None else f"{file}:{METHODS[steering.method].strengths.suggested:g}"


def contrast_prompts(
    concept: str | None, positive: str | None, negative: str | None
) -> tuple[str, list[str], list[str]]:
    """The concept's name and its two sets of prompts, from the options of these names."""
    if positive is not None and negative is not None:
        return concept or Path(positive).stem, read_prompts(positive), read_prompts(negative)
    if positive is not None or negative is not None:
        raise InputError("give both --positive and --negative")
    if not concept:
        raise InputError(
            "name a bundled --concept (see `mlx-lqr concepts`), or give --positive FILE and --negative FILE"
        )
    return concept, *bundled_prompts(concept)
