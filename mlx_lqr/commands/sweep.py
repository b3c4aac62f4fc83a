"""Commands that run at several strengths: what -c and --strengths ask for together.

-c FILE:STRENGTH runs at STRENGTH, -c FILE at each of --strengths. Where both could be meant the command refuses, so
that no number is ever taken for a multiple of another.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from mlx_lqr.commands.help import STEERING, option
from mlx_lqr.commands.values import StrengthsType
from mlx_lqr.errors import InputError
from mlx_lqr.runtime.arguments import ControllerChoice
from mlx_lqr.tasks import NamedSteering, named_steering

STRENGTHS = (1.0, 2.0, 3.0)
"""Where nobody names any"""

shares_option = option(
    "--shares",
    type=StrengthsType(),
    metavar="NUMBERS",
    heading=STEERING,
    help="For several -c FILE: how much of each strength they get, in their order, such as 1,-0.5. By default 1 each.",
)


def strengths_of(
    choices: Sequence[ControllerChoice], strengths: Sequence[float] | None
) -> list[tuple[ControllerChoice, tuple[float, ...]]]:
    """Each controller with the strengths to run it at: its own, or else those of --strengths.

    Args:
        choices: of the -c options.
        strengths: of --strengths, None where it was not given.

    Raises:
        InputError: --strengths was given though every controller has its own.
    """
    if all(choice.strengths for choice in choices):
        refuse_both(choices, "--strengths", strengths)
    swept = tuple(STRENGTHS if strengths is None else strengths)
    return [(choice, choice.strengths or swept) for choice in choices]


def refuse_both(choices: Sequence[ControllerChoice], name: str, numbers: Sequence[float] | None) -> None:
    """Raise `InputError` where an option says how strongly to steer and -c FILE:STRENGTH does so too."""
    own = next((choice for choice in choices if choice.strengths), None)
    if own is not None and numbers is not None:
        raise InputError(f"{name} and -c {own} both say how strongly to steer: leave one of the two numbers out")


def sweep(
    choices: Sequence[ControllerChoice], strengths: Sequence[float] | None, shares: Sequence[float] | None
) -> tuple[NamedSteering | None, list[float]]:
    """All the -c options as one steering, and the strengths to run it at; without any, the unsteered model alone.

    Args:
        choices: of the -c options: all with a strength of their own, or none.
        strengths: of --strengths, None where it was not given.
        shares: of --shares, None where it was not given.

    Raises:
        InputError: a file that holds no controller, controllers that do not go together, or strengths said twice.
    """
    refuse_both(choices, "--strengths", strengths)
    refuse_both(choices, "--shares", shares)
    own = [strength for choice in choices for strength in choice.strengths]
    if own and len(own) < len(choices):
        raise InputError("give every -c a strength, FILE:STRENGTH, or none (then see --strengths and --shares)")
    if shares is not None and len(shares) != len(choices):
        raise InputError(f"--shares needs a number for every -c: {len(choices)}, not {len(shares)}")
    if not choices:
        return None, [0.0]
    if not own:
        return _together(choices, shares), list(STRENGTHS if strengths is None else strengths)
    named = ", ".join(map(str, choices))
    click.echo(f"Note: measured at one strength only, {named}; for several, leave it out and use --strengths", err=True)
    if len(set(own)) == 1:
        return _together(choices, None), own[:1]
    return _together(choices, own), [1.0]


def _together(choices: Sequence[ControllerChoice], shares: Sequence[float] | None) -> NamedSteering:
    return named_steering(
        [(choice.file, share) for choice, share in zip(choices, shares or [1.0] * len(choices), strict=True)]
    )
