"""The measured comparison of docs/comparison.md: its split, and that its script runs."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks.comparison import split  # noqa: E402


def test_every_row_is_in_one_part_and_stays_there(tmp_path: Path) -> None:
    rows = [{"prompt": f"text number {i}", "label": i} for i in range(400)]
    split.write_rows(tmp_path / "xstest.jsonl", rows)
    parts = {part: split.rows_of(tmp_path, "xstest", part) for part in split.PARTS}
    numbers = [row["label"] for part in parts.values() for row in part]
    assert sorted(numbers) == list(range(400))
    assert 160 <= len(parts["report"]) <= 240
    assert all(60 <= len(parts[part]) <= 140 for part in ("fit", "tune"))

    split.write_rows(tmp_path / "xstest.jsonl", rows[::-3])
    for part, before in parts.items():
        kept = split.rows_of(tmp_path, "xstest", part)
        assert kept == [row for row in before[::-1] if row in rows[::-3]]


def test_the_split_is_the_one_that_was_stated() -> None:
    first_bytes = {"how are you": 0x0B, "A": 0x55, "test": 0x9F}  # printf TEXT | sha256sum
    assert [split.part_of(text) for text in first_bytes] == ["fit", "tune", "report"]
    assert split.part_of(" A\n") == "tune"
