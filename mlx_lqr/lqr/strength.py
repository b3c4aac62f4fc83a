"""How strongly to steer where nobody says a number: what a file recommends, and what it knows of milder and harder.

A method's strengths mean something else for each method, concept and model. What they cost can be compared: the
divergence (KL) of the steered model from the unsteered one, in nats a token. A budget is so much of it, and a
`Calibration` says which strength of one concept reaches each budget.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from mlx_lqr.errors import InputError
from mlx_lqr.files.json_text import Entries

Strengths = tuple[float, ...]
"""One for each concept."""
Budget = Literal["gentle", "normal", "strong"]
BUDGETS: Mapping[Budget, float] = {"gentle": 0.2, "normal": 0.4, "strong": 0.8}
"""The divergence from the unsteered model that steering may cost, in nats a token."""


@dataclass(frozen=True)
class Calibration:
    """For each budget the strength of one concept that reaches it.

    Where even the strongest sensible strength stays below a budget, it is that one, and `divergence` says how far it
    goes.

    Raises:
        InputError: not one number for each budget; strengths of 0, of two signs, or that go up and down;
            or a divergence below 0.
    """

    strength: Mapping[Budget, float]
    """Of the sign that brings the concept in, or out, for methods that only remove one."""
    divergence: Mapping[Budget, float]
    """Nats a token, measured at that strength."""

    def __post_init__(self) -> None:
        for name, numbers in (("strength", self.strength), ("divergence", self.divergence)):
            if {*numbers} != {*BUDGETS} or not all(math.isfinite(number) for number in numbers.values()):
                raise InputError(f"a calibration needs a finite {name} for each of {', '.join(BUDGETS)}")
        strengths = [self.strength[budget] for budget in BUDGETS]
        one_way = sorted(strengths) in (strengths, strengths[::-1])  # an angle falls
        if 0 in strengths or len({strength > 0 for strength in strengths}) > 1 or not one_way:
            raise InputError(f"strengths must have one sign and go one way with the budget, not {strengths}")
        if min(self.divergence.values()) < 0:
            raise InputError(f"a divergence cannot be below 0, as in {dict(self.divergence)}")

    def at(self, budget: Budget) -> float:
        """The strength for a budget.

        Raises:
            InputError: there is no such budget.
        """
        if budget not in self.strength:
            raise InputError(f"budget must be {' or '.join(map(repr, get_args(Budget)))}, not {budget!r}")
        return self.strength[budget]


Calibrations = tuple[Calibration | None, ...]
"""One for each concept, None for those without; empty where none has one."""


class Recommending(Protocol):
    """Steering that may recommend a strength."""

    @property
    def concepts(self) -> tuple[str, ...]: ...
    @property
    def strength(self) -> Strengths | None: ...
    @property
    def calibration(self) -> Calibrations: ...


def default_strength(steering: Recommending) -> Strengths:
    """The strength used where none is given: for each concept the recommended one, or 1."""
    return steering.strength if steering.strength is not None else (1.0,) * len(steering.concepts)


def strength_at(steering: Recommending, budget: Budget | None = None, times: float = 1.0) -> Strengths:
    """So many times the strength for a budget, or where none is named the recommended one.

    Raises:
        InputError: the steering has none, or `times` is not finite.
    """
    if not math.isfinite(times):
        raise InputError(f"times must be a finite number, not {times!r}")
    if budget is None:
        if steering.strength is None:
            raise InputError(f"{', '.join(steering.concepts)} has no recommended strength: {_WAY_OUT}")
        return tuple(times * strength for strength in steering.strength)
    return tuple(times * calibration.at(budget) for calibration in _all_calibrations(steering, budget))


def calibrated_strength(steering: Recommending, calibration: Calibration, budget: Budget) -> Strengths:
    """What steering of one concept recommends that has this calibration.

    Raises:
        InputError: it has several concepts, or there is no such budget.
    """
    if len(steering.concepts) > 1:
        raise InputError("a calibration is of one concept: calibrate each alone, then combine them")
    return (calibration.at(budget),)


def combined_strength(steerings: Sequence[Recommending]) -> Strengths | None:
    """The recommended strengths of several steerings, one after another, 1 for those without; None if none has one."""
    if all(one.strength is None for one in steerings):
        return None
    return tuple(strength for one in steerings for strength in default_strength(one))


def combined_calibration(steerings: Sequence[Recommending]) -> Calibrations:
    """The calibrations of several steerings, one after another."""
    if not any(one.calibration for one in steerings):
        return ()
    return tuple(part for one in steerings for part in one.calibration or (None,) * len(one.concepts))


def strength_metadata(steering: Recommending) -> dict[str, str]:
    """The metadata entries for a recommended strength and for calibrations; none for what there is not."""
    entries = {}
    if steering.strength is not None:
        entries["strength"] = json.dumps(steering.strength)
    if any(steering.calibration):
        entries["calibration"] = json.dumps([None if one is None else _pairs(one) for one in steering.calibration])
    return entries


def read_strength(entries: Entries, concepts: int) -> Strengths | None:
    """The strength recommended in a file's metadata, or None.

    Raises:
        ValueError: it is not one finite number for each concept.
    """
    if "strength" not in entries:
        return None
    strength = entries.numbers("strength")
    if len(strength) != concepts:
        raise ValueError(f"strength {entries.text('strength')} for {concepts} concepts")
    return strength


def read_calibration(entries: Entries, concepts: int) -> Calibrations:
    """The calibrations in a file's metadata.

    Raises:
        ValueError: there is not one for each concept, or one cannot be (see `Calibration`).
    """
    if "calibration" not in entries:
        return ()
    return tuple(None if pairs is None else _of_pairs(pairs) for pairs in entries.named_pairs("calibration", concepts))


_WAY_OUT = "fit it again, or give a number"


def _all_calibrations(steering: Recommending, budget: Budget) -> list[Calibration]:
    every = steering.calibration or (None,) * len(steering.concepts)
    for concept, calibration in zip(steering.concepts, every, strict=True):
        if calibration is None:
            raise InputError(f"{concept} is not calibrated, so that it has no {budget} strength: {_WAY_OUT}")
    return [calibration for calibration in every if calibration is not None]


def _pairs(calibration: Calibration) -> dict[Budget, tuple[float, float]]:
    """Strength and divergence by budget, as files have them."""
    return {budget: (calibration.strength[budget], calibration.divergence[budget]) for budget in BUDGETS}


def _of_pairs(pairs: Mapping[str, tuple[float, float]]) -> Calibration:
    if {*pairs} != {*BUDGETS}:
        raise ValueError(f"its calibration is for {', '.join(pairs)[:40]!r} and not for {', '.join(BUDGETS)}")
    try:
        return Calibration({name: pairs[name][0] for name in BUDGETS}, {name: pairs[name][1] for name in BUDGETS})
    except InputError as error:  # which would go for a mistake of the person and not for a damaged file
        raise ValueError(str(error)) from error
