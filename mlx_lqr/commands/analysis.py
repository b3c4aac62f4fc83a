"""What `certify` and `linearity` have in common: the last tokens of prompts, a model, and a controller of one concept.

Everything that can be refused is refused before the model is loaded. What comes out is a table, or JSON, and with -o a
folder of plots and numbers.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlx_lqr.analysis.inputs import check_strengths, default_prompts
from mlx_lqr.backends.protocol import Model, Progress
from mlx_lqr.commands.help import Decorator, together
from mlx_lqr.commands.options import (
    Loading,
    controller_option,
    force_option,
    json_option,
    loading_options,
    model_argument,
    output_option,
    prompts_option,
    seed_option,
    strengths_option,
)
from mlx_lqr.commands.output import say
from mlx_lqr.commands.progress import NOTHING_WRITTEN, progress_bars, stopping
from mlx_lqr.commands.sweep import asked_or_default, refuse_unused
from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import check_writable
from mlx_lqr.files.prompts import read_prompts
from mlx_lqr.files.results import as_json as to_json
from mlx_lqr.files.results import write_json
from mlx_lqr.loading import load, load_steering
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.methods.steering import only_controller
from mlx_lqr.runtime.arguments import Asked, ControllerChoice, asked_strength

if TYPE_CHECKING:
    from matplotlib.figure import Figure

R = TypeVar("R")


@dataclass(frozen=True)
class Analysis:
    """What a person asked for, checked."""

    model: str
    loading: Loading
    file: str | None
    """The controller's"""
    controller: Controller | None
    strengths: list[float]
    prompts: list[str]
    seed: int
    output: Path | None
    force: bool
    as_json: bool
    name: str
    """Of the file with the numbers"""

    def measure(self, measure: Callable[[Model, Progress], R]) -> R:
        """Load the model and run this on it."""
        with stopping(NOTHING_WRITTEN), progress_bars() as progress:
            return measure(load(self.model, **self.loading, progress=progress), progress)

    def report(self, numbers: Any, figures: Callable[[Any], Mapping[str, Figure]], show: Callable[[], None]) -> None:
        """Write numbers and plots where they were asked for, and print the numbers or a table.

        Args:
            numbers: a result, or a part of one.
            figures: what of the module `plots` to draw, by file name.
            show: prints the table.
        """
        if self.output is not None:
            plots = _plots_or_refusal()
            write_json(self.output / f"{self.name}.json", numbers, force=self.force)
            plots.save_all(figures(plots), self.output, force=self.force)
        if self.as_json:
            say(json.dumps(to_json(numbers)))
            return
        show()
        if self.output is not None:
            say(f"Wrote plots and numbers to {self.output}")


def analysis_options(*, name: str, done: str, prompts: str, count: int, controller: str) -> Decorator:
    """The options of both commands, which a command gets as one argument `analysis`.

    Args:
        name: of the file with the numbers.
        done: what happens to a controller here, for the refusal of other methods' files.
        prompts: the help of --prompts.
        count: how many bundled prompts there are by default.
        controller: what the controller is for; without it the command needs one.
    """

    options = together(
        model_argument,
        prompts_option(f"{prompts} By default {count} bundled half sentences."),
        controller_option(swept=True, required=not controller, repeat=f"One file, of one concept. {controller}"),
        strengths_option,
        seed_option("Of the random directions.", 0),
        output_option("A folder for plots (PNG and SVG) and numbers (JSON).", required=False, metavar="FOLDER"),
        force_option,
        json_option(),
        loading_options,
    )

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def collected(
            *,
            model: str,
            loading: Loading,
            controllers: tuple[ControllerChoice, ...],
            strengths: list[Asked] | None,
            prompts: str | None,
            seed: int,
            output: str | None,
            force: bool,
            as_json: bool,
            **own: Any,
        ) -> Any:
            choice = _only(controllers)
            steering = only_controller(load_steering(choice.file, model), done) if choice is not None else None
            chosen = _strengths(choice, strengths, steering)
            folder = _folder(output, name, force=force)
            texts = _prompts(prompts, count, steering)
            file = choice.file if choice is not None else None
            return command(
                analysis=Analysis(model, loading, file, steering, chosen, texts, seed, folder, force, as_json, name),
                **own,
            )

        return options(collected)

    return decorate


def _prompts(file: str | None, count: int, controller: Controller | None) -> list[str]:
    if file is not None:
        return read_prompts(file)
    return default_prompts(count, controller.concepts if controller is not None else ())


def _folder(output: str | None, name: str, *, force: bool) -> Path | None:
    """Where plots and numbers go, if they can be drawn and written."""
    if output is None:
        return None
    _plots_or_refusal()
    check_writable(Path(output) / f"{name}.json", "results", force=force)
    return Path(output)


def _only(choices: tuple[ControllerChoice, ...]) -> ControllerChoice | None:
    if len(choices) > 1:
        raise InputError(f"one controller at a time here, not {len(choices)}: give one -c")
    return choices[0] if choices else None


def _strengths(
    choice: ControllerChoice | None, strengths: list[Asked] | None, controller: Controller | None
) -> list[float]:
    if choice is None or controller is None:
        return []
    refuse_unused([choice], strengths)
    asked = asked_or_default([controller], choice.strengths or strengths)
    chosen = [asked_strength(controller, one)[0] for one in asked]
    check_strengths(chosen)
    return chosen


def _plots_or_refusal() -> Any:
    """The module that draws, refused before long work where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib: pip install 'mlx-lqr[plots]', or leave -o out")
    from mlx_lqr.analysis import plots

    return plots
