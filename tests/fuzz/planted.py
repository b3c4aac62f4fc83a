"""Uses with a fault of each kind, by which the fuzzer itself is tried."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.mutations import mutate_object
from fuzz.specimens import Specimen
from fuzz.worker import NBYTES
from mlx_lqr import InputError


def taken(folder: Path, file: Path) -> None:
    """Nothing is wrong."""


def refused(folder: Path, file: Path) -> None:
    """As it should be."""
    raise InputError(f"{file} is damaged: make it again")


def raises(folder: Path, file: Path) -> None:
    """What nobody has caught."""
    raise KeyError("name")


def leaves(folder: Path, file: Path) -> None:
    """No `Exception`."""
    raise SystemExit(2)


def crashes(folder: Path, file: Path) -> None:
    """As native code does."""
    os.abort()


def hangs(folder: Path, file: Path) -> None:
    """For ever."""
    while True:
        pass


def fills_memory(folder: Path, file: Path) -> None:
    """More than there may be."""
    bytearray(NBYTES + (1 << 30))


def prints(folder: Path, file: Path) -> None:
    """A traceback, although it goes on."""
    os.write(2, b"Traceback (most recent call last):\n")


OUTCOMES: dict[Callable[[Path, Path], Any], str] = {
    taken: "taken",
    refused: "refused",
    raises: "KeyError",
    leaves: "SystemExit",
    crashes: "the process ends",
    hangs: "computes for too long",
    prints: "prints a traceback",
}
"""What the fuzzer has to say of each."""
if sys.platform == "linux":  # where a process can be given less memory
    OUTCOMES[fills_memory] = "MemoryError"


def made_planted(place: Path) -> list[Specimen]:
    """One specimen of each."""
    (place / "any").mkdir()
    (place / "any" / "file.json").write_text('{"a": 1}')
    return [Specimen(use.__name__, "any", "file.json", mutate_object, use) for use in OUTCOMES]
