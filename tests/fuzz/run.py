"""Mutants given out to workers, and what came of them."""

from __future__ import annotations

import collections
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from fuzz import worker

Result = tuple[int, str, str, str, str, str]
"""Number, kind, file, change, outcome, detail"""
WAITING = 120.0
"""Seconds on the clock for a mutant that waits and does not compute, which is limited by the worker itself."""


@dataclass
class Report:
    """How many mutants there were of each kind."""

    counts: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    faults: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        outcome = result[4] if result[4] in ("taken", "refused") else "faults"
        self.counts[result[1], outcome] += 1
        if outcome == "faults":
            self.faults.append(result)

    def __str__(self) -> str:
        outcomes = ("taken", "refused", "faults")
        lines = [f"{'kind':<28}" + "".join(f"{name:>9}" for name in outcomes)]
        for kind in sorted({kind for kind, _ in self.counts}):
            lines.append(f"{kind:<28}" + "".join(f"{self.counts[kind, name]:>9}" for name in outcomes))
        totals = [sum(count for (_, name), count in self.counts.items() if name == outcome) for outcome in outcomes]
        return "\n".join([*lines, f"{'all':<28}" + "".join(f"{total:>9}" for total in totals)])


def run(seed: int, numbers: Iterable[int], processes: int = 1, *, light: bool = False) -> Iterator[Result]:
    """Try mutants, in as many processes. One that a mutant ends is started again."""
    waiting = iter(numbers)
    workers = [_Worker(light) for _ in range(processes)]
    busy = {one: number for one in workers if (number := next(waiting, None)) is not None}
    for one, number in busy.items():
        one.ask(seed, number)
    try:
        while busy:
            wait([one.connection for one in busy], timeout=1)
            for one, number in list(busy.items()):
                outcome = one.answer()
                if outcome is None:
                    continue
                yield (number, *outcome)
                del busy[one]
                if (following := next(waiting, None)) is not None:
                    busy[one] = following
                    one.ask(seed, following)
    finally:
        for one in workers:
            one.end()


class _Worker:
    """A process, started anew whenever it has ended."""

    def __init__(self, light: bool) -> None:
        self._light = light
        self._start()

    def ask(self, seed: int, number: int) -> None:
        if not self._process.is_alive():
            self._start()
        self.connection.send((seed, number))
        self._asked = True
        self._seconds = 0.0

    def answer(self) -> tuple[Any, ...] | None:
        """What came of the mutant; None while it is being tried."""
        try:
            if self.connection.poll(0):
                kind, content = self.connection.recv()
                return content if kind == "done" else None
        except (EOFError, OSError):
            pass
        else:
            if self._process.is_alive():
                return None
        self._process.join()
        return self._ended()

    def end(self) -> None:
        self._process.kill()
        self._process.join()

    def _ended(self) -> tuple[str, ...]:
        code = self._process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        outcome = "computes for too long" if code == -signal.SIGXCPU else "the process ends"
        return "?", "?", "?", outcome, name

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self._process = context.Process(target=worker.serve, args=(other,), kwargs={"light": self._light}, daemon=True)
        self._process.start()
        other.close()
