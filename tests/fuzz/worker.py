"""The process in which mutants are tried, and its limits: a crash, a hang or full memory ends it and nothing else."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from fuzz.specimens import Specimen, made
from mlx_lqr import InputError

SECONDS = 10
"""Of computing, for one mutant."""
NBYTES = 4 << 30
"""Of address space beyond what a worker has when it begins."""
Making = Callable[[Path], list[Specimen]]
Outcome = tuple[str, str]
"""taken, refused or the name of a fault; what there is to say about it"""
Tried = tuple[str, str, str, str, str]
"""Kind, file, change, and the outcome"""


def serve(connection: Connection, scratch: str, making: Making = made, seconds: int = SECONDS) -> None:
    """Try the mutants that are asked for, until the process is ended.

    Args:
        scratch: a folder for all that is written; whoever ends the process removes it.
        making: writes the sound files into a folder.
        seconds: of computing, for one mutant.
    """
    tempfile.tempdir = scratch
    errors, place = _kept_errors(), Path(tempfile.mkdtemp())
    specimens = making(place)
    _limit_memory()
    with suppress(EOFError):  # whoever asked has ended
        while True:
            seed, number = connection.recv()
            _limit_time(seconds)
            connection.send(tried(place, specimens, seed, number, errors))


def mutant(specimens: Sequence[Specimen], seed: int, number: int) -> tuple[Specimen, Random]:
    """The specimen whose turn it is, and the source of its changes."""
    random = Random(f"{seed}/{number}")
    return random.choices(specimens, [one.weight for one in specimens])[0], random


def tried(place: Path, specimens: Sequence[Specimen], seed: int, number: int, errors: Path | None = None) -> Tried:
    """What comes of one mutant.

    Args:
        errors: what libraries have printed as an error, where that is kept.
    """
    specimen, random = mutant(specimens, seed, number)
    folder = place / specimen.folder
    file = folder / specimen.file
    sound = file.read_bytes()
    content, what = specimen.mutate(sound, random)
    try:
        file.write_bytes(content)
        outcome, detail = used(specimen, folder, file)
    finally:
        file.write_bytes(sound)
    if errors is not None:
        said = errors.read_text("utf-8", "replace")
        os.truncate(errors, 0)
        if "Traceback" in said or "panicked" in said:
            outcome, detail = "prints a traceback", f"({outcome} {detail[-200:]}) {said[-500:]}"
    return specimen.kind, f"{specimen.folder}/{specimen.file}", what, outcome, detail


def used(specimen: Specimen, folder: Path, file: Path) -> Outcome:
    """What comes of using a file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            specimen.use(folder, file)
    except InputError as error:
        line = str(error)
        if "\n" in line or not line.strip() or len(line) > 2000:
            return "refused in more than a line", line[:300]
        try:
            line.encode()
        except UnicodeEncodeError:
            return "a refusal that cannot be printed", repr(line[:300])
        return "refused", line
    except BaseException as error:
        return type(error).__name__, f"{_place(error)} {str(error)[:200]}\n{traceback.format_exc()[-3000:]}"
    return "taken", ""


def _place(error: BaseException) -> str:
    """The last line of ours that it went through."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename for part in ("site-packages", "tests/", "lib/python"))
    ]
    return (
        f"{Path(frames[-1].filename).parent.name}/{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        if frames
        else "-"
    )


def _kept_errors() -> Path:
    """Send what is written to the terminal's errors, by libraries of any language, to a file."""
    handle, name = tempfile.mkstemp()
    os.close(handle)
    sys.stderr.flush()
    os.dup2(os.open(name, os.O_APPEND | os.O_WRONLY), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return Path(name)


def _limit_memory() -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + NBYTES,) * 2)


def _limit_time(seconds: int) -> None:
    import resource

    spent = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(spent.ru_utime + spent.ru_stime) + seconds + 1, hard))
