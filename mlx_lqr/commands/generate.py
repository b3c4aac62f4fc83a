"""mlx-lqr generate: continue one text or a file of them, steered or not, as text or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import IO, Any

import numpy as np

from mlx_lqr.analysis.tracking import track
from mlx_lqr.backends.protocol import Model
from mlx_lqr.commands.help import OUTPUT, command, option
from mlx_lqr.commands.options import (
    Loading,
    adaptive_option,
    controller_option,
    decoding_options,
    json_option,
    loading_options,
    model_argument,
    prompt_option,
    prompts_option,
)
from mlx_lqr.commands.output import say
from mlx_lqr.commands.progress import progress_bars
from mlx_lqr.commands.running import load_to_run
from mlx_lqr.errors import InputError
from mlx_lqr.files.prompts import read_prompts
from mlx_lqr.lqr.adapt import adapt
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.prompts import tokenise
from mlx_lqr.methods.recording import Recording
from mlx_lqr.methods.running import adapts
from mlx_lqr.methods.steering import only_controller
from mlx_lqr.runtime import Options, Piece, batch_stream, stream
from mlx_lqr.runtime.arguments import ControllerChoice, given_or_piped, load_controllers
from mlx_lqr.runtime.decode import MAX_TOKENS
from mlx_lqr.runtime.monitor import largest_excess


@command()
@model_argument
@prompt_option("The text to continue; without it, what comes through a pipe.")
@prompts_option(
    'Continue every prompt of a file, several at a time: one a line, or JSON lines with a "prompt" key.', "prompt_file"
)
@controller_option()
@adaptive_option
@decoding_options(MAX_TOKENS)
@json_option("Print one JSON object a prompt instead of text.")
@option(
    "--track",
    "tracked",
    is_flag=True,
    heading=OUTPUT,
    help="With --json: add each layer's feature, setpoint and control.",
)
@loading_options
def generate(
    model: str,
    prompt: str | None,
    prompt_file: str | None,
    controllers: tuple[ControllerChoice, ...],
    adaptive: bool | None,
    as_json: bool,
    tracked: bool,
    loading: Loading,
    **options: Any,
) -> None:
    """Continue a text, steered or not.

    The text is taken as it is, without a chat template: `mlx-lqr chat` applies one.
    """
    if prompt is not None and prompt_file is not None:
        raise InputError("give one text with -p or a file with --prompts, not both")
    if tracked and not as_json:
        raise InputError("--track gives numbers for every layer: add --json")
    if tracked and not controllers:
        raise InputError("--track compares a controller's features with their setpoints: add -c FILE")
    prompts = read_prompts(prompt_file) if prompt_file is not None else [given_or_piped(prompt)]
    controller, strengths = load_controllers(controllers, model)
    if tracked and controller is not None:
        only_controller(controller, "tracked")
    with progress_bars() as progress:
        steerings = () if controller is None else (controller,)
        loaded = load_to_run(model, loading, progress, steerings=steerings, adaptive=adaptive)
    settings: Options = {**options, "adaptive": adaptive}  # type: ignore[typeddict-item]
    if controller is not None:
        settings |= {"controller": controller, "strength": strengths}

    def record(answer: _Answer) -> str:
        return json.dumps(_fields(loaded, answer, settings, tracked))

    if prompt_file is not None:
        show = (lambda answer, out: say(record(answer), file=out)) if as_json else _show
        _answer_all(loaded, prompts, settings, show, tracked)
    elif as_json:
        answer = _Answer(prompts[0], recording=Recording() if tracked else None)
        settings["record"] = answer.recording
        for piece in stream(loaded, prompts[0], **settings):
            answer.add(piece)
        say(record(answer))
    else:
        for piece in stream(loaded, prompts[0], **settings):
            say(piece.text, nl=False)
        say()


@dataclass
class _Answer:
    """What has followed a prompt so far."""

    prompt: str
    number: int = 1
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    recording: Recording | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        if piece.token is not None:
            self.tokens.append(piece.token)


def _answer_all(
    model: Model, prompts: list[str], settings: Options, show: Callable[[_Answer, IO[str]], None], tracked: bool
) -> None:
    """Print the answers in order, each as soon as the batch that it belongs to is done."""
    records = [Recording() for _ in prompts] if tracked else None
    answers = [
        _Answer(prompt, i + 1, recording=records[i] if records is not None else None)
        for i, prompt in enumerate(prompts)
    ]
    printed = 0
    out = sys.stdout  # a progress bar replaces sys.stdout
    # On a terminal the answers themselves show how far things are, and a bar would be drawn across them.
    with nullcontext(None) if out.isatty() else progress_bars() as report:

        def print_finished(stage: str, done: int, total: int) -> None:
            nonlocal printed
            for answer in answers[printed:done]:
                show(answer, out)
            printed = done
            if report:
                report(stage, done, total)

        for i, piece in batch_stream(model, prompts, records=records, progress=print_finished, **settings):
            answers[i].add(piece)


def _show(answer: _Answer, out: IO[str]) -> None:
    say(f"[{answer.number}] {answer.prompt}", bold=True, file=out)
    say(f"{answer.text}\n", file=out)


def _fields(model: Model, answer: _Answer, settings: Options, tracked: bool) -> dict[str, Any]:
    """The JSON object of an answer."""
    fields: dict[str, Any] = {
        "model": model.name,
        "prompt": answer.prompt,
        "text": answer.text,
        "tokens": answer.tokens,
    }
    controller, strengths = settings.get("controller"), settings.get("strength")
    if controller is None or not isinstance(strengths, list):
        return fields
    fields["concepts"] = dict(zip(controller.concepts, strengths, strict=True))
    if tracked:
        stored = only_controller(controller, "tracked")
        used = adapt(model, stored, answer.prompt) if adapts(stored, settings.get("adaptive")) else stored
        fields["tracking"] = _tracking(model, answer.prompt, used, strengths)
        fields["control"] = _control(model, stored, answer)
    return fields


def _tracking(
    model: Model, prompt: str, controller: Controller, strengths: list[float]
) -> dict[str, dict[str, list[float]]]:
    """Feature and setpoint of every concept at the input of each block."""
    signal = track(model, prompt, controller, strengths)
    return {
        name: {"feature": signal.feature[:, i].tolist(), "setpoint": signal.setpoint[:, i].tolist()}
        for i, name in enumerate(controller.concepts)
    }


def _control(model: Model, controller: Controller, answer: _Answer) -> dict[str, Any]:
    """What the law measured and did: alpha_k of every concept and |u_k|, at the prompt's last token and at every token
    after it, in the layers with control; and how far it left the linear region, if the controller knows one."""
    assert answer.recording is not None
    prompt_length = len(tokenise(model, answer.prompt, any_length=True))
    error, push = answer.recording.answer(controller, prompt_length, len(answer.tokens))
    layers = list(controller.active_layers)
    excess = largest_excess(controller, error, push)
    return {
        "layers": layers,
        "alpha": {name: _or_null(error[:, layers, i]) for i, name in enumerate(controller.concepts)},
        "push": push[:, layers].tolist(),
        "excess": asdict(excess) if excess is not None else None,
    }


def _or_null(values: np.ndarray) -> list[Any]:
    """As nested lists, None for NaN, which JSON does not have."""
    cells = values.astype(object)
    cells[np.isnan(values)] = None
    nested: list[Any] = cells.tolist()
    return nested
