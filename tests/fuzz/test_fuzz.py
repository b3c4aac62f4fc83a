"""Some mutants of what is cheap to load; `make fuzz` tries thousands of every kind. And the fuzzer finds faults."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.platforms import posix

from fuzz.planted import OUTCOMES, made_planted
from fuzz.run import Report, run
from fuzz.specimens import Specimen, made
from fuzz.worker import mutant, tried, used

SEED, COUNT = 19, 250


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def specimens(place: Path) -> list[Specimen]:
    return made(place, light=True)


def test_sound_files_are_taken(place: Path, specimens: list[Specimen]) -> None:
    """Or their mutants would be refused for what nobody has changed."""
    for one in specimens:
        assert used(one, place / one.folder, place / one.folder / one.file) == ("taken", ""), one


def test_damaged_files_are_refused_in_one_line(place: Path, specimens: list[Specimen]) -> None:
    faults = [
        result for n in range(COUNT) if (result := tried(place, specimens, SEED, n))[3] not in ("taken", "refused")
    ]
    assert not faults


def test_a_seed_and_a_number_say_what_a_mutant_is(place: Path, specimens: list[Specimen]) -> None:
    def content(number: int) -> tuple[str, bytes]:
        one, random = mutant(specimens, SEED, number)
        return one.file, one.mutate((place / one.folder / one.file).read_bytes(), random)[0]

    first = [content(number) for number in range(20)]
    assert first == [content(number) for number in range(20)]
    assert len({mutated for _, mutated in first}) > 15


@posix
def test_faults_of_every_kind_are_found_and_outlived() -> None:
    """Each of these ends, hangs, fills or prints something; the next mutant has its turn all the same."""
    numbers: dict[str, int] = {}
    specimens = [Specimen(use.__name__, "", "", None, use) for use in OUTCOMES]  # type: ignore[arg-type]
    number = 0
    while len(numbers) < len(specimens):
        numbers.setdefault(mutant(specimens, SEED, number)[0].kind, number)
        number += 1
    report, outcomes = Report(), {}
    for result in run(SEED, sorted(numbers.values()), making=made_planted, seconds=1):
        report.add(result)
        outcomes[result[0]] = result[4]
    assert outcomes == {numbers[use.__name__]: outcome for use, outcome in OUTCOMES.items()}
    assert len(report.faults) == len(OUTCOMES) - 2
