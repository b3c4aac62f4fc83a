"""The measured comparison of docs/comparison.md: its split, and that its script measures and writes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.backends import tiny_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks.comparison import methods, split  # noqa: E402
from benchmarks.comparison.__main__ import main  # noqa: E402
from mlx_lqr import tasks  # noqa: E402


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


@pytest.fixture(scope="module")
def folders() -> list[Path]:
    """Two tiny models that read and write bytes."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folders = [tiny_folder("llama", seed=seed, vocab_size=256, max_position_embeddings=2048) for seed in (0, 1)]
    for folder in folders:
        tokenizer.save(str(folder / "tokenizer.json"))
    return folders


def test_the_script_measures_writes_and_goes_on(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "word_family", lambda concept: ["p", "u", "y"])  # steering brings these bytes, not dogs
    data, output, docs = (tmp_path / name for name in ("data", "out", "docs"))
    data.mkdir()
    asked = [f"What is {i} and {i}?" for i in range(40)]
    answers = {"best_answer": "x", "correct_answers": ["x"], "incorrect_answers": ["y", "z"]}
    split.write_rows(data / "truthfulqa.jsonl", [{"question": question, **answers} for question in asked])
    model_options = ["--smollm2", str(folders[0]), "--gemma", str(folders[1]), "--data", str(data), "-o", str(output)]
    only = ["--only", "concept-dog", "--only", "truthfulness", "--method", "alqr", "--method", "actadd"]

    def run(*arguments: str, status: int = 0) -> str:
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == status, result.output
        return result.output

    measured = ["run", "--model", "smollm2", "--quick", *model_options, *only]

    def measured_with_kept(results: Path, name: str) -> Any:
        """The result of one experiment, of which A-LQR's rows alone were measured."""
        folder = tmp_path / name / "smollm2"
        shutil.copytree(output / "smollm2" / "fits", folder / "fits")
        run(*(one.replace(str(output), str(tmp_path / name)) for one in measured), "--kept", str(results))
        assert not (folder / "concept-dog" / "rows" / "dog" / "actadd.jsonl").exists()
        return json.loads((folder / "concept-dog" / "result.json").read_text())

    run(*measured)
    files = {path: path.read_bytes() for path in output.rglob("*.json*")}
    monkeypatch.setattr(methods, "calibrate", None)  # and nothing is fitted, calibrated or written again
    run(*measured)
    assert files == {path: path.read_bytes() for path in output.rglob("*.json*")}

    rows = output / "smollm2" / "truthfulness" / "rows" / "truthfulness" / "alqr.jsonl"
    rows_read = [json.loads(line) for line in rows.read_text().splitlines()[1:]]
    choices = [row for row in rows_read if row["part"] == "choices"]
    assert {split.part_of(row["question"]) for row in choices} == {"report"}

    run("page", "-o", str(output), "--results", str(tmp_path / "results"), "--docs", str(docs))
    page = docs / "comparison.md"
    result = json.loads((tmp_path / "results" / "smollm2" / "truthfulness.json").read_text())
    alqr = next(one for one in result["methods"] if one["method"] == "alqr")
    strength = alqr["sources"]["truthfulness"]["strength"]["normal"]
    at_normal = [row["mc2"] for row in choices if row["strength"] == strength]
    line = next(line for line in page.read_text().split("## Truthfulness")[1].splitlines() if "**alqr**" in line)
    assert f"{sum(at_normal) / len(at_normal):.2f} (" in line.split("|")[3]
    assert (ROOT / "benchmarks" / "comparison" / "findings.md").read_text().strip() in page.read_text()
    assert (docs / "comparison-concept-dog-smollm2.svg").stat().st_size > 1000

    again = [one.replace(str(output), str(tmp_path / "again")) for one in measured]
    run(*again[: again.index("--method")], "--method", "actadd", "--choices", str(tmp_path / "results"))
    for name in ("concept-dog", "truthfulness"):  # at the strengths that are known, for the same numbers
        first, second = (
            json.loads((folder / "smollm2" / name / "result.json").read_text())["methods"]
            for folder in (output, tmp_path / "again")
        )
        (known,) = (one for one in first if one["method"] == "actadd")
        assert second[0]["sources"] == known["sources"]
        assert second[0]["budgets"]["normal"]["metrics"] == known["budgets"]["normal"]["metrics"]
    shutil.copytree(tmp_path / "results", tmp_path / "gone")
    for file in (tmp_path / "gone" / "smollm2").glob("*.json"):
        earlier = json.loads(file.read_text())
        for method in earlier["methods"]:
            for source in method["sources"].values():
                source["setting"] = "of once"
        file.write_text(json.dumps(earlier))
    third = [one.replace(str(output), str(tmp_path / "third")) for one in measured]
    run(*third[: third.index("--method")], "--method", "actadd", "--choices", str(tmp_path / "gone"))
    told = json.loads((tmp_path / "third" / "smollm2" / "concept-dog" / "result.json").read_text())["methods"]
    assert told[0]["failed"].startswith("actadd has no setting 'of once' any more")  # and no other is chosen
    measured_before = (output / "smollm2" / "concept-dog" / "result.json").read_text()
    before, kept = json.loads(measured_before), measured_with_kept(tmp_path / "results", "kept")
    assert kept["comparisons"] == before["comparisons"]
    for old, new in zip(before["methods"], kept["methods"], strict=True):
        leads = [[at.pop("lead", [0.0]) for at in one["budgets"].values()] for one in (old, new)]
        assert np.asarray(leads[0]) == pytest.approx(np.asarray(leads[1]), abs=1e-3)  # intervals too: paired
        assert new.pop("kept", False) == (new["method"] == "actadd")
        assert new == old

    shutil.copytree(tmp_path / "results", tmp_path / "older")
    file = tmp_path / "older" / "smollm2" / "concept-dog.json"
    earlier = json.loads(file.read_text())
    file.write_text(json.dumps({**earlier, "rows": {"generations": 1}}))
    assert "is of other rows" in run(*measured, "--kept", str(tmp_path / "older"), status=2)
    file.write_text(json.dumps({**earlier, "asked": "of other questions"}))
    assert "is of other prompts or sampling" in run(*measured, "--kept", str(tmp_path / "older"), status=2)
    file.write_text(json.dumps({one: told for one, told in earlier.items() if one != "asked"}))
    assert "is of other prompts or sampling" in run(*measured, "--kept", str(tmp_path / "older"), status=2)
    file.write_text(json.dumps({**earlier, "budgets": {"normal": 0.3}}))
    assert "is of other budgets" in run(*measured, "--kept", str(tmp_path / "older"), status=2)
    monkeypatch.setattr(methods, "calibrate", lambda *_: pytest.fail("calibrated"))
    with pytest.raises(pytest.fail.Exception, match="calibrated"):  # ours is not taken from there
        run(*again[: again.index("--method")], "--method", "alqr", "--choices", str(tmp_path / "results"))
