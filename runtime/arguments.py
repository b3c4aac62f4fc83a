"""What a person writes on a command line -> what the library takes, for every front end and parser of options."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_lqr.backends.protocol import FREQUENCY_PENALTY, RECENT
from mlx_lqr.errors import InputError
from mlx_lqr.files.text import is_unicode
from mlx_lqr.launched import count
from mlx_lqr.loading import load_steering
from mlx_lqr.lqr.strength import BUDGETS, Budget, Strengths, default_strength
from mlx_lqr.methods.steering import Steering, combine

DECODING_HELP: Mapping[str, str] = {
    "max_tokens": "At most this many tokens.",
    "temperature": "Higher is more random; 0 always takes the likeliest token.",
    "top_p": "Sample from the likeliest tokens that have this share of the probability.",
    "top_k": "Sample from this many likeliest tokens; 0: from all.",
    "min_p": "Sample from tokens that have at least this share of the likeliest one's probability.",
    "repetition_penalty": "Above 1, tokens that have occurred become less likely.",
    "frequency_penalty": f"Above 0, tokens become less likely for each time among the last {RECENT} drawn (-2 to 2; "
    f"0: off). By default {FREQUENCY_PENALTY:g}, and off at temperature 0.",
    "presence_penalty": f"Above 0, tokens among the last {RECENT} drawn become less likely (-2 to 2).",
    "seed": "The same number gives the same text; without one, each call gives another.",
    "stop": "End the answer before this text; may be repeated.",
    "overflow": "When the context is full: stop with an error, or roll on without the oldest tokens.",
}
"""What the options of decoding do, by the names of `mlx_lqr.Options`"""
ADAPTER_HELP = "Run the model with the LoRA adapter in FOLDER, in the format of mlx-lm or of PEFT."
BACKEND_HELP = (
    "What computes; by default llama.cpp for a .gguf file, where it is installed and there is no GPU for MLX."
)
STRENGTH_HELP = "STRENGTH is a number, a multiple of the recommended one such as 1.5x, or gentle, normal or strong."
BUDGET_HELP = (
    "The strength of each FILE without one: what keeps its divergence from the unsteered model near "
    f"{', '.join(f'{nats:g}' for nats in BUDGETS.values())} nats a token ({', '.join(BUDGETS)})."
)
DTYPE_DEFAULT = "by default the checkpoint's own on a GPU, and float32 on a CPU."


@dataclass(frozen=True)
class Times:
    """So many times the strength that a file recommends, written 1.5x."""

    factor: float

    def __str__(self) -> str:
        return f"{self.factor:g}x"


Asked = float | Times | Budget
"""How a person says how strongly to steer."""


@dataclass(frozen=True)
class ControllerChoice:
    """What follows a -c: a controller's file, and at which strengths it is to steer."""

    file: str
    strengths: tuple[Asked, ...] = ()
    """Empty where the person named none"""

    def __str__(self) -> str:
        """As the person may have written it."""
        if not self.strengths:
            return self.file
        return f"{self.file}:{','.join(map(_written, self.strengths))}"


def parse_controller(text: str, *, several_strengths: bool = False) -> ControllerChoice:
    """FILE[:STRENGTH], the one meaning of every -c (see `parse_strength`). A file whose own name has a colon is fine.

    Args:
        text: what the person wrote.
        several_strengths: also take FILE:1,2,3.

    Raises:
        InputError: STRENGTH is none, or there are several where one is meant.
    """
    file, colon, strengths = text.rpartition(":")
    if not colon or Path(text).is_file() or "/" in strengths or "\\" in strengths:
        return ControllerChoice(text)
    asked = tuple(parse_strength(one, "write -c FILE:STRENGTH") for one in strengths.split(","))
    if len(asked) > 1 and not several_strengths:
        raise InputError(f"one strength here, not {strengths!r}: write -c FILE:STRENGTH")
    return ControllerChoice(file, asked)


def parse_strength(text: str, advice: str) -> Asked:
    """A number, a multiple such as 1.5x, or the name of a budget.

    Args:
        text: what the person wrote.
        advice: how to write it here, for a refusal.

    Raises:
        InputError: it is none of these, or not finite.
    """
    for budget in BUDGETS:
        if text == budget:
            return budget
    try:
        number = float(text.removesuffix("x"))
    except ValueError:
        raise InputError(
            f"strength must be a number, a multiple such as 1.5x, or {', '.join(BUDGETS)}, not {text!r} ({advice})"
        ) from None
    if not math.isfinite(number):
        raise InputError(f"strength must be a finite number, not {text!r} ({advice})")
    return Times(number) if text.endswith("x") else number


def with_budget(choices: Sequence[ControllerChoice], budget: Budget | None) -> tuple[ControllerChoice, ...]:
    """The -c options, with the budget of --budget for those without a strength of their own.

    Raises:
        InputError: there is a budget, and none that it is for.
    """
    if budget is None:
        return tuple(choices)
    if not choices:
        raise InputError("--budget says how strongly each -c FILE steers: add -c FILE")
    if all(choice.strengths for choice in choices):
        raise InputError(f"--budget and -c {choices[0]} both say how strongly to steer: leave one of the two out")
    return tuple(choice if choice.strengths else replace(choice, strengths=(budget,)) for choice in choices)


def asked_strength(steering: Steering, asked: Asked) -> Strengths:
    """A strength for each concept, as a person asked for it.

    Raises:
        InputError: a multiple of what the steering does not recommend, or a budget that it is not calibrated for.
    """
    if isinstance(asked, Times):
        return steering.strength_at(times=asked.factor)
    if isinstance(asked, str):
        return steering.strength_at(asked)
    return (asked,) * len(steering.concepts)


def _written(asked: Asked) -> str:
    return str(asked) if isinstance(asked, Times | str) else f"{asked:g}"


def load_controller(choice: ControllerChoice, model: str = "MODEL") -> tuple[Steering, Strengths]:
    """The controller, and a strength for each of its concepts: by default what the file recommends, or 1."""
    steering = load_steering(choice.file, model)
    if choice.strengths:
        (asked,) = choice.strengths
        return steering, asked_strength(steering, asked)
    if steering.strength is None:
        warnings.warn(
            f"{choice.file} recommends no strength, so 1 is used: fit it again, or write -c FILE:STRENGTH",
            stacklevel=2,
        )
    return steering, default_strength(steering)


def load_controllers(choices: Sequence[ControllerChoice], model: str = "MODEL") -> tuple[Steering | None, list[float]]:
    """All the -c options as one steering and a strength for each of its concepts."""
    loaded = [load_controller(choice, model) for choice in choices]
    if not loaded:
        return None, []
    strengths = [strength for _, own in loaded for strength in own]
    return combine([steering for steering, _ in loaded]), strengths


def given_or_piped(prompt: str | None) -> str:
    """The prompt of the command line, or where there is none the text that comes through a pipe.

    One newline at the end of what is piped is not part of it: `echo` and editors put it there.

    Raises:
        InputError: neither is there, it is blank, or it is not UTF-8 text.
    """
    if prompt is None:
        prompt = _piped()
    elif not is_unicode(prompt):  # bytes of the command line that Python could not decode
        raise InputError("the prompt is not UTF-8 text")
    if not prompt.strip():
        raise InputError("the prompt is empty, or nothing but spaces: give the text to continue, -p TEXT")
    return prompt


def _piped() -> str:
    if count() > 1:  # mlx.launch hands on what is typed, but not that it has ended
        raise InputError("under mlx.launch, give the text to continue with -p TEXT")
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("give the text to continue: -p TEXT, or through a pipe")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")  # whatever encoding the terminal has
    except UnicodeDecodeError:
        raise InputError("what comes through the pipe is not UTF-8 text") from None
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
