"""What /compare and /track draw: two answers side by side, and feature against setpoint layer by layer."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlx_lqr.backends.protocol import Float32
from mlx_lqr.commands.output import say
from mlx_lqr.commands.tables import show_table
from mlx_lqr.lqr.tracking import as_strength
from mlx_lqr.runtime import Piece
from mlx_lqr.runtime.monitor import Excess
from mlx_lqr.runtime.streams import printable
from mlx_lqr.runtime.tracking import TrackedAnswer

if TYPE_CHECKING:
    from rich.console import Console

Marks = tuple[str, str, str]
"""For the feature, the setpoint, and the feature without steering"""
MARKS = "█", "┃", "○"
PLAIN_MARKS = "#", "|", "o"
"""Where the output's encoding does not have the others"""
NUMBERS = "layer", "setpoint", "feature", "without", "alpha", "|u|"
"""The columns of `draw_tracking` before its bars"""
LEFT_OUT_FIRST = "without", "|u|", "alpha", "setpoint"
"""Of these, where a line is too short for all"""
LEAST_BAR = 8
"""Characters"""


def draw_comparison(answers: Sequence[tuple[str, Iterator[Piece]]]) -> None:
    """Titled answers in columns side by side; on a terminal they fill as they are decoded, one after the other."""
    from rich import box
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    console = _console()
    texts = [""] * len(answers)

    def table() -> Table:
        columns = Table(box=box.SIMPLE_HEAD, expand=True)
        for title, _ in answers:
            columns.add_column(Text(printable(title, console.file)), ratio=1, overflow="fold")
        columns.add_row(*(Text(printable(text.strip(), console.file)) for text in texts))
        return columns

    with Live(table(), console=console, auto_refresh=False) as live:
        for i, (_, pieces) in enumerate(answers):
            for piece in pieces:
                texts[i] += piece.text
                live.update(table(), refresh=True)
    if not console.is_terminal:  # where rich leaves the last line open
        console.line()


def draw_tracking(tracked: TrackedAnswer, excess: Excess | None = None) -> None:
    """A table for each concept: in every layer the setpoint, the feature with and without steering, alpha_k, |u_k| and
    a bar; and where the answer was furthest from the region in which the linear model was checked.

    Bars are in strengths, because the residual stream grows from layer to layer.
    """
    console = _console()
    marks = _marks(console.encoding)
    for i in range(len(tracked.controller.concepts)):
        _tracking_table(tracked, i, console.width, marks)
        say()
    reached, aim, other = marks
    legend = [
        f"{reached} feature  {aim} setpoint (-: no control here)  {other} feature without steering",
        "Numbers are in the residual stream's units, bars in strengths.",
        "alpha: how far the feature is below where the push ends; |u|: length of what all concepts add to the layer.",
    ]
    if excess is not None:
        legend.append(f"Over the whole answer: {excess}.")
    for line in legend:
        say(textwrap.fill(line, console.width))


def _tracking_table(tracked: TrackedAnswer, i: int, width: int, marks: Marks) -> None:
    """The table of concept i. Columns of numbers that leave no place for bars in this width are left out."""
    controller = tracked.controller
    columns = tracked.steered.setpoint[:, i], tracked.steered.feature[:, i], tracked.unsteered.feature[:, i]
    strengths = [as_strength(controller, column, i) for column in columns]
    idle = [k for k in range(controller.num_layers) if not np.any(tracked.gain[k, :, i])]
    numbers = {name: [name] for name in NUMBERS}
    for k in range(controller.num_layers):
        setpoint, feature, without = (f"{column[k]:.4g}" for column in columns)
        control = ("-", "-") if k in idle else (f"{tracked.error[k, i]:.3g}", f"{tracked.push[k]:.3g}")
        for name, number in zip(
            NUMBERS, (str(k), "-" if k in idle else setpoint, feature, without, *control), strict=True
        ):
            numbers[name].append(number)
    for name in LEFT_OUT_FIRST:
        if width - _taken_by(numbers) < LEAST_BAR:
            del numbers[name]
    axis = _Axis.over(strengths[0], strengths[1], max(LEAST_BAR, width - _taken_by(numbers)))
    bars = [axis.labels()]
    for k in range(controller.num_layers):
        aim, reached, unsteered = (float(strength[k]) for strength in strengths)
        bars.append(axis.bar(reached, unsteered, None if k in idle else aim, marks))
    head, *rows = ([*row] for row in zip(*numbers.values(), bars, strict=True))
    show_table(
        head,
        rows,
        left=(len(head) - 1,),
        title=f"{controller.concepts[i]}, strength {tracked.strength[i]:g}, at the last token of the answer",
        dim=idle,
    )


def _taken_by(columns: Mapping[str, Sequence[str]]) -> int:
    """The characters of a line that columns take, with the spaces after them."""
    return sum(max(map(len, column)) + 2 for column in columns.values())


@dataclass(frozen=True)
class _Axis:
    """A horizontal axis of `width` characters from `low` to `high`."""

    low: float
    high: float
    width: int

    @classmethod
    def over(cls, setpoints: Float32, features: Float32, width: int) -> _Axis:
        """From zero to the setpoints, and to the features as long as these are not far off."""
        span = max(1.0, float(np.abs(setpoints).max()))
        low = max(min(0.0, float(setpoints.min()), float(features.min())), min(0.0, float(setpoints.min())) - span)
        high = min(max(0.0, float(setpoints.max()), float(features.max())), max(0.0, float(setpoints.max())) + span)
        return cls(low, max(high, low + 1), width)

    def bar(self, feature: float, without: float, setpoint: float | None, marks: Marks = MARKS) -> str:
        """From zero to the feature, with the marks upon it; what lies beyond the axis is drawn at its end."""
        first, last = sorted((self._cell(0.0), self._cell(feature)))
        cells = [marks[0] if first <= cell <= last else " " for cell in range(self.width)]
        cells[self._cell(without)] = marks[2]
        if setpoint is not None:
            cells[self._cell(setpoint)] = marks[1]
        return "".join(cells)

    def labels(self) -> str:
        """Numbers at the ends, and zero."""
        cells = [" "] * self.width
        for value in (self.low, self.high, 0.0):
            text = f"{value:.2g}"
            start = min(self._cell(value), self.width - len(text))
            cells[start : start + len(text)] = text
        return "".join(cells)

    def _cell(self, value: float) -> int:
        share = (value - self.low) / (self.high - self.low)
        return min(self.width - 1, max(0, round(share * (self.width - 1))))


def _marks(encoding: str) -> Marks:
    try:
        "".join(MARKS).encode(encoding)
    except (LookupError, UnicodeEncodeError):
        return PLAIN_MARKS
    return MARKS


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)
