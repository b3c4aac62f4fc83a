"""What was measured of a model is kept, and measured again where the file is damaged."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from mlx_lqr.backends.measurement import Measurement, measured

SOUND = Measurement(0.001, 0.002, 0.003, differences=False)


def measure_twice(damaged: str | None, place: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a model was measured that has been accepted before, and whose file is then this text."""
    monkeypatch.setenv("MLX_LQR_CACHE", str(place))
    count = 0

    def measure() -> Measurement:
        nonlocal count
        count += 1
        return SOUND

    assert measured(Measurement, measure, ["this model"], "any") == SOUND
    (file,) = (place / "measured").iterdir()
    assert json.loads(file.read_text()) == asdict(SOUND)
    if damaged is not None:
        file.write_text(damaged)
    assert measured(Measurement, measure, ["this model"], "any") == SOUND
    return count


def test_a_model_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure_twice(None, tmp_path, monkeypatch) == 1


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "[" * 5000,
        "[1]",
        json.dumps({**asdict(SOUND), "more": 1}),
        json.dumps({**asdict(SOUND), "steps": "0.1"}),
        json.dumps({**asdict(SOUND), "steps": -1}),
        json.dumps({**asdict(SOUND), "chain": None}),
        json.dumps({**asdict(SOUND), "differences": 3}),
    ],
)
def test_a_damaged_file_is_measured_again(damaged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure_twice(damaged, tmp_path, monkeypatch) == 2
