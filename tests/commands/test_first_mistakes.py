"""What people new to the commands type: one line that says what to do, or a note where numbers would mislead."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers.backends import tiny_on
from helpers.command_line import refused, run, small
from helpers.controllers import controller_for
from helpers.tiny_tokenizers import chatting

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.protocol import Model
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.steering import law_of
from mlx_lqr.tasks.records import Records

MODEL = "no-such-model"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a baseline's file, one of Jacobians and some prompts."""
    monkeypatch.chdir(tmp_path)
    model = chatting()
    mlx_lqr.fit_baseline(model, "angular", [[1, 2], [3]], [[4, 5], [6]]).save("angular.safetensors")
    controller_for(model).save("a.safetensors")
    mlx_lqr.linearize(model, [[1]]).save("jacobians.safetensors")
    for name, count in (("one", 1), ("two", 2), ("six", 6)):
        (tmp_path / f"{name}.txt").write_text("".join(f"Sentence number {i}.\n" for i in range(count)))
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ("generate", MODEL, "-p", "Hi", "-c", "{}"),
        ("generate", MODEL, "-p", "Hi", "-c", "{}:2"),
        ("chat", MODEL, "-c", "{}"),
        ("linearity", MODEL, "-c", "{}"),
        ("certify", MODEL, "-c", "{}"),
        ("eval", "concept", MODEL, "-c", "{}", "-o", "out"),
        ("compare", "concept", MODEL, "-c", "{}", "-o", "out"),
        ("show", "{}"),
    ],
)
def test_a_concept_in_place_of_a_file_names_the_command(
    command: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MODEL if command[0] in ("generate", "chat", "linearity", "certify") else "MODEL"
    says = refused(*(part.format("ocean") for part in command))
    assert f"mlx-lqr fit {model} --concept ocean -o ocean.safetensors" in says
    (place / "ocean.safetensors").touch()
    assert "did you mean ocean.safetensors?" in refused(*(part.format("ocean") for part in command))
    assert "no file oceans" in refused(*(part.format("oceans") for part in command))


@pytest.mark.parametrize("command", ["linearity", "certify"])
def test_a_file_of_another_kind_is_named(command: str, place: Path) -> None:
    assert "method angular" in refused(command, MODEL, "-c", "angular.safetensors")
    assert "'mlx-lqr jacobians 1'" in refused(command, MODEL, "-c", "jacobians.safetensors")
    assert "folder is a folder" in refused(command, MODEL, "-c", "folder")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fit", MODEL, "--concept", "dog", "-o", "o", "--layers", "0-99999999999"], "layers must look like"),
        (["fit", MODEL, "--concept", "dog", "-o", "o", "--jacobians", ""], "no file"),
        (["fit", MODEL, "--positive", "", "--negative", "one.txt", "-o", "o"], "cannot read"),
        (["linearize", MODEL, "--prompts", "", "-o", "o"], "cannot read"),
        (["linearity", MODEL, "--prompts", ""], "cannot read"),
        (["linearity", "tiny", "--prompts", "two.txt", "--modes", "99999999"], "modes must be between 1 and 32"),
        (["linearity", "tiny", "--prompts", "two.txt", "--seed", "-1"], "seed must be zero or above"),
        (["certify", "tiny", "-c", "a.safetensors", "--prompts", "two.txt", "--seed", "-1"], "seed must be zero or"),
        (["generate", MODEL, "-p", "Hi", "-c", "a.safetensors:nan"], "finite number, not 'nan'"),
        (["chat", MODEL, "-c", "a.safetensors", "-c", "a.safetensors:2"], "appears twice"),
        (["eval", "concept", MODEL, "--words", "a", "-n", "0", "-o", "out"], "max_tokens (-n)"),
        (["eval", "concept", MODEL, "--words", "a", "--top-p", "3", "-o", "out"], "top_p"),
        (["eval", "concept", MODEL, "--words", "a", "--temperature", "-1", "-o", "out"], "temperature"),
    ],
)
def test_wrong_values_are_refused_in_one_line(
    arguments: list[str], says: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    assert says in refused(*arguments)


@pytest.mark.parametrize("method", ["alqr", "actadd"])
@pytest.mark.parametrize(("positive", "few"), [("one", True), ("six", True), ("many", False)])
def test_few_prompts_are_noted(
    method: str, positive: str, few: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    (place / "many.txt").write_text("".join(f"{i} dogs.\n" for i in range(8)))
    (place / "others.txt").write_text("".join(f"{i} bells\n" for i in range(8)))
    sets = "--positive", f"{positive}.txt", "--negative", "others.txt", "--method", method, "--layers", "1"
    result = run("fit", "tiny", *sets, "-o", "out.safetensors")
    assert result.exit_code == 0, result.output
    assert ("Note: " in result.stderr and "give 20 or more" in result.stderr) == few


def test_few_held_out_prompts_are_noted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    result = run("certify", "tiny", "-c", "a.safetensors", "--prompts", "six.txt")
    assert result.exit_code == 0, result.output
    assert "Note: 3 prompts calibrated and 3 checked" in result.stderr
    result = run("linearity", "tiny", "--prompts", "two.txt")
    assert "Note: medians over 2 prompts" in result.stderr


@pytest.mark.parametrize("kind", METHODS)
def test_strengths_beyond_any_use_are_noted(kind: str) -> None:
    model = tiny_on("mlx", "llama")
    sets = [[1, 2, 3], [4, 5], [7, 9]], [[9, 8], [6, 5], [11, 12]]
    steering: Any = (
        mlx_lqr.fit(model, *sets, layers="all") if kind == "alqr" else mlx_lqr.fit_baseline(model, kind, *sets)  # type: ignore[arg-type]
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        law = law_of(steering, 15.0)
        law.strength = -90 if "angular" in kind else -15
        for strength in (1e9, -1e4):
            with pytest.raises(UserWarning, match="beyond any use"):
                law_of(steering, strength)
            with pytest.raises(UserWarning, match="beyond any use"):
                law.strength = strength
    assert not caught


def test_a_strength_beyond_use_is_one_note(smollm2: Model, dog: Path) -> None:
    result = run("generate", "demo", "-p", "Hi", "-n", 2, "--seed", 1, "-c", f"{dog}:1e9")
    assert result.exit_code == 0
    assert result.stderr.count("Note: strength 1e+09 is beyond any use") == 1


def test_an_evaluation_of_which_nothing_was_measured_may_be_begun_with_other_settings(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    parts = {"parts": {"part": {"rows": 1}}}
    Records({"max_tokens": 99999999, **parts}, file)
    records = Records({"max_tokens": 4, **parts}, file)
    records.append(0.0, "part", [{"text": "a"}])
    assert len(Records({"max_tokens": 4, **parts}, file).of(0.0, "part")) == 1
    with pytest.raises(InputError, match="other settings"):
        Records({"max_tokens": 5, **parts}, file)
