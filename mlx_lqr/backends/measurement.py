"""Whether a model that is on no list can be steered: what its backend has measured on the model itself, once, and kept.

Every error is relative to the model's own forward pass, with every block in float32.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, get_type_hints

import numpy as np

from mlx_lqr.errors import InputError, first_line
from mlx_lqr.files.atomic import writing
from mlx_lqr.files.cache import cache_folder
from mlx_lqr.files.json_text import parse_json

EXACT, USABLE = 1e-2, 0.2
"""Relative errors: up to the former nothing is said, beyond the latter the model is refused."""


@dataclass(frozen=True)
class Measurement:
    """Relative errors, and what follows for how the model is run; backends add what else they need to know."""

    steps: float
    """Of logits token by token, against those of one pass."""
    jacobian: float
    """Of single blocks' Jacobians, against the blocks' own response when their input is moved."""
    chain: float
    """Of the product of all Jacobians, against the model's own response when the first block's input is moved."""
    differences: bool
    """Whether the blocks have no derivative that is right, so that differences stand in for it."""

    @property
    def is_exact(self) -> bool:
        """Whether there is nothing to say about it."""
        return max(self.steps, self.jacobian, self.chain) <= EXACT

    @property
    def findings(self) -> list[str]:
        """What was measured, a line each."""
        how = "differences" if self.differences else "a reverse pass"
        return [
            f"blocks' derivatives, by {how}: off by {self.jacobian:.1e}",
            f"their product, against the model's response: off by {self.chain:.1e}",
            f"logits token by token, against one pass: off by {self.steps:.1e}",
        ]

    def check(self, family: str) -> None:
        """Warn of what is not exact.

        Raises:
            InputError: it is too far off.
        """
        for error, what in (
            (self.steps, "its logits token by token differ from those of one pass"),
            (self.jacobian, "the derivatives of its blocks differ from their own response"),
            (self.chain, "the product of its blocks' Jacobians differs from the model's own response"),
        ):
            if not error <= USABLE:
                raise InputError(
                    f"models of the type {family!r} cannot be steered: {what} by {_percent(error)}, at most "
                    f"{_percent(USABLE)} is usable: use another model"
                )
        if self.steps > EXACT:
            _note(f"models of the type {family!r} give other logits token by token, by {_percent(self.steps)}")
        if max(self.chain, self.jacobian) > EXACT:
            _note(
                f"in models of the type {family!r} blocks hand on more than their output: a controller's prediction "
                f"is off by {_percent(max(self.chain, self.jacobian))}, and its gains are not quite optimal"
            )


M = TypeVar("M", bound=Measurement)


Said = Callable[[str | None], str | None]


def measured(
    kind: type[M], measure: Callable[[], M], identity: Sequence[Any], family: str, said: Said = lambda text: text
) -> M:
    """The measurement of an accepted model: what was kept of this model, or what is measured now.

    Args:
        identity: all that the numbers depend on, as JSON takes it.
        said: of several processes that share the model, what the first one says: all have to measure it, or none.

    Raises:
        InputError: the model fails while it is measured, or is too far off.
    """
    try:
        measurement = _kept(kind, measure, identity, said)
    except InputError:
        raise
    except Exception as error:  # of any of the library's modules
        raise InputError(
            f"models of the type {family!r} cannot be steered: measuring this one failed ({first_line(error)})"
        ) from error
    measurement.check(family)
    return measurement


def _kept(kind: type[M], measure: Callable[[], M], identity: Sequence[Any], said: Said) -> M:
    digest = hashlib.sha256(json.dumps(list(identity)).encode()).hexdigest()[:24]
    file = cache_folder() / "measured" / f"{digest}.json"
    text: str | None = None
    with suppress(OSError):
        text = file.read_text("utf-8")
    try:
        return _read(kind, said(text) or "")
    except ValueError:  # none, damaged, or not of this version
        measurement = measure()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with writing(file) as temporary:
            temporary.write_text(json.dumps(asdict(measurement)), "utf-8")
    except (OSError, InputError):  # it will be measured again
        pass
    return measurement


def _read(kind: type[M], text: str) -> M:
    """The measurement in a text.

    Raises:
        ValueError: another kind of thing, or values of other types.
    """
    entries, types = parse_json(text), get_type_hints(kind)
    if not isinstance(entries, dict) or entries.keys() != types.keys():
        raise ValueError("its entries are not those of a measurement")
    for name, value in entries.items():
        if isinstance(value, bool) != (types[name] is bool) or not isinstance(value, (int, float)) or value < 0:
            raise ValueError(f"its {name} cannot be {value!r}")
    return kind(**entries)


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def _percent(error: float) -> str:
    return f"{100 * error:.3g} %"


def _note(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=5)
