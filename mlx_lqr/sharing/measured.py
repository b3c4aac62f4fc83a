"""What `mlx-lqr eval` has measured of a controller, for its page: control and cost at each strength."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import Any

from mlx_lqr.errors import InputError
from mlx_lqr.files.json_text import read_json
from mlx_lqr.methods.steering import Steering
from mlx_lqr.tasks.records import FORMAT
from mlx_lqr.tasks.steering import NamedSteering

_ADVICE = "give its FILE.summary.json"
_LEFT_OUT = ("tokens", "distinct_1", "distinct_3")
"""Numbers of a summary that say little beside the others"""


@dataclass(frozen=True)
class Measured:
    """A task's numbers, ready to be shown."""

    task: str
    strengths: tuple[float, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    """The name of each number, and its values with intervals; the one that is to be controlled first"""

    @property
    def markdown(self) -> str:
        head = [f"strength {one:g}" if one else "not steered" for one in self.strengths]
        lines = [[self.task, *head], ["---"] * (1 + len(head)), *([name, *values] for name, values in self.rows)]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read_measured(path: str | PathLike[str], steering: Steering) -> Measured:
    """The numbers of a summary that `mlx-lqr eval` wrote.

    Args:
        path: FILE.summary.json.
        steering: what was evaluated.

    Raises:
        InputError: the file cannot be read, is no such summary, or is one of another steering.
    """
    said: Any = read_json(path, _ADVICE)
    try:
        if said["format"] != FORMAT:
            raise ValueError("another format")
        evaluated, task, control = said["steering"], str(said["task"]), str(said["control"])
        measured = {float(one["strength"]): one["metrics"] for one in said["strengths"]}
        names = [name for name in next(iter(measured.values())) if name not in _LEFT_OUT]
        names.sort(key=lambda name: name != control)
        rows = tuple((name, tuple(_cell(metrics[name]) for metrics in measured.values())) for name in names)
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise InputError(f"{path} is no summary that `mlx-lqr eval` wrote: {_ADVICE}") from error
    own = NamedSteering("", steering).settings
    if not isinstance(evaluated, dict) or evaluated.get("digest") != own["digest"]:
        raise InputError(f"{path} was measured with another controller: evaluate this one (mlx-lqr eval ... -c FILE)")
    return Measured(_plain(task), tuple(measured), tuple((_plain(name), values) for name, values in rows))


def _cell(estimate: dict[str, Any]) -> str:
    value, low, high = (_number(estimate[name]) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _number(value: float | None) -> str:
    """A number of the file, where null stands for what is not finite."""
    return "-" if value is None or not math.isfinite(value) else f"{float(value):.3g}"


def _plain(text: str) -> str:
    """A name from the file, where nothing is markup."""
    return "".join(letter for letter in text if letter.isalnum() or letter in " -_").replace("_", " ").strip()
