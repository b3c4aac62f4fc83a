"""How the benchmarks compare and print what they have measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence


def ratio(above: list[float], below: list[float]) -> float:
    """The median over rounds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def say(what: str, value: float, unit: str, target: str = "") -> None:
    print(f"{what:50}{value:9.2f} {unit:10}{target}", flush=True)


def print_means(heads: Sequence[str], rows: Mapping[tuple[str, ...], Sequence[Mapping[str, float]]]) -> None:
    """Print a Markdown table: after the cells that name a row, the means of what was measured for it."""
    columns = list(next(iter(rows.values()))[0])
    print(f"| {' | '.join([*heads, *columns])} |\n{'|---' * (len(heads) + len(columns))}|")
    for names, each in rows.items():
        means = [f"{statistics.mean(one[column] for one in each):.2f}" for column in columns]
        print(f"| {' | '.join([*names, *means])} |")
