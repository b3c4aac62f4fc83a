"""What a person writes after an option -> what the library takes. A mistake is one line, before any work is done."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import click
from click.shell_completion import CompletionItem

from mlx_lqr.errors import InputError
from mlx_lqr.runtime.arguments import Asked, ControllerChoice, parse_controller, parse_strength

MOST_LAYERS = 10_000
"""More than any model has, and few enough to list."""

Layers = list[int] | Literal["auto", "all"]


def parse_layers(text: str | None) -> Layers | None:
    """Layers such as "20-29", "0,4,8-11", "auto" or "all"."""
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if text == "all":
        return "all"
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            span = range(int(first), int(last if dash else first) + 1)
            if len(span) > MOST_LAYERS:
                raise ValueError(part)
            layers.extend(span)
    except (OverflowError, ValueError):
        raise InputError(f"layers must look like 20-29, 0,4,8-11, auto or all, not {text!r}") from None
    return layers


def parse_strengths(text: str) -> list[Asked]:
    """Strengths such as "0,1.5,3", "0.5x,1x,2x" or "gentle,strong"."""
    return [parse_strength(part.strip(), "write --strengths 1,2,3 or 0.5x,1x,2x") for part in text.split(",")]


def parse_numbers(text: str, name: str) -> list[float]:
    """Numbers such as "0,1.5,3".

    Args:
        text: numbers with commas between them.
        name: what to call them in a refusal.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name} must look like 1,2,3, not {text!r}") from None
    if not all(math.isfinite(number) for number in numbers):
        raise InputError(f"{name} must be finite numbers, not {text!r}")
    return numbers


def expanded(file: str) -> str:
    """A file's name where a shell has not put the home folder in place of ~."""
    try:
        return str(Path(file).expanduser())
    except RuntimeError:  # ~name, of a user who does not exist here
        return file


class ControllerType(click.ParamType[ControllerChoice]):
    """FILE[:STRENGTH], for every -c; where a command says so also FILE:1,2,3."""

    name = "controller"

    def __init__(self, *, several_strengths: bool = False) -> None:
        self.several_strengths = several_strengths

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ControllerChoice:
        return parse_controller(value, several_strengths=self.several_strengths)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class StrengthsType(click.ParamType[list[Asked]]):
    """Strengths with commas between them."""

    name = "strengths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Asked]:
        return parse_strengths(value)


class NumbersType(click.ParamType[list[float]]):
    """Numbers with commas between them."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        return parse_numbers(value, param.opts[-1].strip("-") if param is not None else "numbers")


class LayersType(click.ParamType[Layers | None]):
    """Layers such as 20-29, 0,4,8-11, auto or all."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Layers | None:
        return parse_layers(value)
