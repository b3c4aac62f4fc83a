"""Commands that run at several strengths: what -c and --strengths ask for together.

-c FILE:STRENGTH runs at STRENGTH, -c FILE at each of --strengths. Where both could be meant the command refuses, so
that no number is ever taken for a multiple of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlx_lqr.commands.help import STEERING, option
from mlx_lqr.commands.output import say
from mlx_lqr.commands.values import NumbersType
from mlx_lqr.errors import InputError
from mlx_lqr.loading import load_steering
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.steering import Steering
from mlx_lqr.runtime.arguments import Asked, ControllerChoice, Times, asked_strength
from mlx_lqr.tasks import NamedSteering, named_steering

MULTIPLES = (Times(0.5), Times(1.0), Times(2.0))
"""Where nobody names any: of the recommended strength, or of what the method suggests where a file recommends none."""

shares_option = option(
    "--shares",
    type=NumbersType(),
    metavar="NUMBERS",
    heading=STEERING,
    help="For several -c FILE: how much of each strength they get, in their order, such as 1,-0.5. By default 1 each.",
)


def refuse_unused(choices: Sequence[ControllerChoice], strengths: Sequence[Asked] | None) -> None:
    """Raise `InputError` where --strengths was given though every controller has its own."""
    if all(choice.strengths for choice in choices):
        refuse_both(choices, "--strengths", strengths)


def refuse_both(choices: Sequence[ControllerChoice], name: str, numbers: Sequence[Asked] | None) -> None:
    """Raise `InputError` where an option says how strongly to steer and -c FILE:STRENGTH does so too."""
    own = next((choice for choice in choices if choice.strengths), None)
    if own is not None and numbers is not None:
        raise InputError(f"{name} and -c {own} both say how strongly to steer: leave one of the two out")


def asked_or_default(steerings: Sequence[Steering], asked: Sequence[Asked] | None) -> Sequence[Asked]:
    """The strengths that were asked for, or where none were those that fit the files."""
    if asked is not None:
        return asked
    unsaid = next((one for one in steerings if one.strength is None), None)
    if unsaid is None:
        return MULTIPLES
    return [times.factor * METHODS[unsaid.method].strengths.suggested for times in MULTIPLES]


def at_strengths(
    named: NamedSteering, steerings: Sequence[Steering], asked: Sequence[Asked] | None
) -> tuple[NamedSteering, tuple[float, ...]]:
    """A steering and the numbers to run it at, for strengths that may be multiples or budgets.

    Where concepts get different strengths, the numbers are the multiples and the shares their recommended strengths.

    Args:
        named: the steering, with the shares that were given.
        steerings: what it is combined of.
        asked: None where nothing was.

    Raises:
        InputError: a file that recommends none of what was asked, or strengths that are no multiples of each other.
    """
    asked = asked_or_default(steerings, asked)
    vectors = [[number for steering in steerings for number in asked_strength(steering, one)] for one in asked]
    if all(len({*vector}) == 1 for vector in vectors):
        return named, tuple(vector[0] for vector in vectors)
    if len(asked) == 1:
        return _shared(named, vectors[0]), (1.0,)
    if not all(isinstance(one, Times) for one in asked):
        raise InputError("for several concepts --strengths takes numbers alone, or multiples alone such as 0.5x,1x,2x")
    recommended = [number for steering in steerings for number in steering.strength_at()]
    return _shared(named, recommended), tuple(one.factor for one in asked if isinstance(one, Times))


def sweep(
    choices: Sequence[ControllerChoice], strengths: Sequence[Asked] | None, shares: Sequence[float] | None
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
    own = [choice.strengths[0] for choice in choices if choice.strengths]
    if own and len(own) < len(choices):
        raise InputError("give every -c a strength, FILE:STRENGTH, or none (then see --strengths and --shares)")
    if shares is not None and len(shares) != len(choices):
        raise InputError(f"--shares needs a number for every -c: {len(choices)}, not {len(shares)}")
    if not choices:
        return None, [0.0]
    loaded = [load_steering(choice.file) for choice in choices]
    given = shares if shares is not None else [1.0] * len(choices)
    named = named_steering([(choice.file, share) for choice, share in zip(choices, given, strict=True)])
    if not own:
        named, numbers = at_strengths(named, loaded, strengths)
        return named, list(numbers)
    said = ", ".join(map(str, choices))
    say(f"Note: measured at one strength only, {said}; for several, leave it out and use --strengths", err=True)
    pairs = zip(loaded, own, strict=True)
    vector = [number for steering, asked in pairs for number in asked_strength(steering, asked)]
    return (named, vector[:1]) if len({*vector}) == 1 else (_shared(named, vector), [1.0])


def _shared(named: NamedSteering, strengths: Sequence[float]) -> NamedSteering:
    """The same, in which number s means s times these strengths, each times its own share."""
    pairs = zip(named.strength(1.0), strengths, strict=True)
    return replace(named, shares=tuple(share * strength for share, strength in pairs))
