"""How the benchmarks compare and print what they have measured."""

from __future__ import annotations

import statistics


def ratio(above: list[float], below: list[float]) -> float:
    """The median over rounds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def say(what: str, value: float, unit: str, target: str = "") -> None:
    print(f"{what:50}{value:9.2f} {unit:10}{target}", flush=True)
