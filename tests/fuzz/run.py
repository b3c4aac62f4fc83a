"""Mutants given out to workers, and what came of them."""

from __future__ import annotations

import collections
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from fuzz import worker
from fuzz.specimens import made
from fuzz.worker import Making, Tried

Result = tuple[int, str, str, str, str, str]
"""Number, kind, file, change, outcome, detail"""
WAITING = 600.0
"""Seconds on the clock for one mutant, its worker's start included; what it computes is limited in the worker."""


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


def run(
    seed: int, numbers: Iterable[int], processes: int = 1, making: Making = made, seconds: int = worker.SECONDS
) -> Iterator[Result]:
    """Try mutants, in as many processes. One that a mutant ends is started again.

    Args:
        making: writes the sound files, in each process.
        seconds: of computing, for one mutant.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        workers = [_Worker(scratch, making, seconds) for _ in range(processes)]
        try:
            yield from _given_out(seed, iter(numbers), workers)
        finally:
            for one in workers:
                one.end()


def _given_out(seed: int, waiting: Iterator[int], workers: Sequence[_Worker]) -> Iterator[Result]:
    busy = {one: number for one in workers if (number := next(waiting, None)) is not None}
    for one, number in busy.items():
        one.ask(seed, number)
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


class _Worker:
    """A process, started anew whenever it has ended."""

    def __init__(self, scratch: str, making: Making, seconds: int) -> None:
        self._given = scratch, making, seconds
        self._start()

    def ask(self, seed: int, number: int) -> None:
        if not self._process.is_alive():
            self._start()
        self.connection.send((seed, number))
        self._until = time.monotonic() + WAITING

    def answer(self) -> Tried | None:
        """What came of the mutant; None while it is being tried."""
        try:
            if self.connection.poll(0):
                answer: Tried = self.connection.recv()
                return answer
        except (EOFError, OSError):
            self._process.join()
            return self._ended()
        if time.monotonic() > self._until:
            self.end()
            return "?", "?", "?", "waits for too long", f"more than {WAITING:g} s"
        return None

    def end(self) -> None:
        self._process.kill()
        self._process.join()

    def _ended(self) -> Tried:
        code = self._process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        outcome = "computes for too long" if code == -signal.SIGXCPU else "the process ends"
        return "?", "?", "?", outcome, name

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self._process = context.Process(target=worker.serve, args=(other, *self._given), daemon=True)
        self._process.start()
        other.close()
