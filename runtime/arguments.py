"""What a person writes on a command line -> what the library takes, for every front end and parser of options."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_lqr.errors import InputError
from mlx_lqr.files.text import is_unicode
from mlx_lqr.launched import count
from mlx_lqr.lqr.strength import Strengths, default_strength
from mlx_lqr.methods.steering import Steering, combine, load_steering

DECODING_HELP: Mapping[str, str] = {
    "max_tokens": "At most this many tokens.",
    "temperature": "Higher is more random; 0 always takes the likeliest token.",
    "top_p": "Sample from the likeliest tokens that have this share of the probability.",
    "top_k": "Sample from this many likeliest tokens; 0: from all.",
    "min_p": "Sample from tokens that have at least this share of the likeliest one's probability.",
    "repetition_penalty": "Above 1, tokens that have occurred become less likely.",
    "seed": "Makes sampling repeatable.",
    "stop": "End the answer before this text; may be repeated.",
    "overflow": "When the context is full: stop with an error, or roll on without the oldest tokens.",
}
"""What the options of decoding do, by the names of `mlx_lqr.Options`"""
ADAPTER_HELP = "Run the model with the LoRA adapter in FOLDER, in the format of mlx-lm or of PEFT."
DTYPE_DEFAULT = "by default the checkpoint's own on a GPU, and float32 on a CPU."


@dataclass(frozen=True)
class ControllerChoice:
    """What follows a -c: a controller's file, and at which strengths it is to steer."""

    file: str
    strengths: tuple[float, ...] = ()
    """Empty where the person named none"""

    def __str__(self) -> str:
        """As the person may have written it."""
        if not self.strengths:
            return self.file
        return f"{self.file}:{','.join(f'{strength:g}' for strength in self.strengths)}"


def parse_controller(text: str, *, several_strengths: bool = False) -> ControllerChoice:
    """FILE[:STRENGTH], the one meaning of every -c. A file whose own name has a colon is fine.

    Args:
        text: what the person wrote.
        several_strengths: also take FILE:1,2,3.

    Raises:
        InputError: STRENGTH is not a finite number, or there are several where one is meant.
    """
    file, colon, strengths = text.rpartition(":")
    if not colon or Path(text).is_file() or "/" in strengths or "\\" in strengths:
        return ControllerChoice(text)
    numbers = tuple(_strength(number) for number in strengths.split(","))
    if len(numbers) > 1 and not several_strengths:
        raise InputError(f"one strength here, not {strengths!r}: write -c FILE:STRENGTH")
    return ControllerChoice(file, numbers)


def _strength(number: str) -> float:
    try:
        strength = float(number)
    except ValueError:
        raise InputError(f"strength must be a number, not {number!r} (write -c FILE:STRENGTH)") from None
    if not math.isfinite(strength):
        raise InputError(f"strength must be a finite number, not {number!r} (write -c FILE:STRENGTH)")
    return strength


def load_controller(choice: ControllerChoice, model: str = "MODEL") -> tuple[Steering, Strengths]:
    """The controller, and a strength for each of its concepts: by default what the file recommends, or 1."""
    steering = load_steering(choice.file, model)
    if not choice.strengths:
        return steering, default_strength(steering)
    (strength,) = choice.strengths
    return steering, (strength,) * len(steering.concepts)


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
