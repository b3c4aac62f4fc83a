"""fit --concept-word, --concept-style and --chat-prompts, and what it says of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.command_line import refused, run

import mlx_lqr

QUICK = "--cost", "feature", "--layers", "28-29", "--jacobian-prompts", 1, "--no-calibration"


def test_a_word_leaves_two_files_to_edit_and_to_fit_from_again(tmp_path: Path) -> None:
    out = tmp_path / "chess.safetensors"
    result = run("fit", "demo", "--concept-word", "chess", "-o", out, *QUICK)
    assert result.exit_code == 0, result.output
    files = [tmp_path / f"chess.{side}.txt" for side in ("positive", "negative")]
    assert [mlx_lqr.read_prompts(file) for file in files] == list(mlx_lqr.concept_prompts("chess"))
    assert "32 + 32 prompts were made from sentence frames" in result.stderr
    assert f"--positive {files[0]} --negative {files[1]}" in result.stderr
    assert "Note" not in result.stderr
    controller = mlx_lqr.Controller.load(out)
    assert controller.concepts == ("chess",)
    assert controller.prompt_counts == ((32, 32),)
    again = "fit", "demo", "--concept-word", "chess", "-o", out
    assert "exists already: fit with it (--positive, --negative), or replace it with --force" in refused(*again)


def test_what_is_wrong_with_given_prompts_is_said_and_the_file_is_written(tmp_path: Path) -> None:
    """Here both sets are of one kind, so that there is nothing to tell apart."""
    sentences = mlx_lqr.bundled_prompts("dog")[1]
    for name, texts in (("a", sentences[:9]), ("b", sentences[9:16])):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts))
    sets = "--positive", tmp_path / "a.txt", "--negative", tmp_path / "b.txt"
    result = run("fit", "demo", *sets, "-o", tmp_path / "c.safetensors", *QUICK)
    assert result.exit_code == 0, result.output
    assert "Prompts were taken as answers in the chat template; --plain-prompts takes" in result.stderr
    assert "Note: 9 positive and 7 negative prompts are few" in result.stderr
    assert "Note: the direction hardly tells apart prompts that it was not computed from" in result.stderr
    assert (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--concept-word", "chess", "--concept", "dog"], "give one of --concept, --concept-word"),
        (["--concept-word", "chess", "--concept-style", "rudely"], "give one of --concept, --concept-word"),
        (["--concept", "dog", "--save-prompts", "x"], "--save-prompts is for prompts that are made"),
        (["--concept-word", "a\nb"], "expected a word such as chess"),
        (["--concept-style", "rudely", "--chat-prompts"], "in the chat template already"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, arguments: list[str], says: str) -> None:
    assert says in refused("fit", "no-such-model", *arguments, "-o", tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


def test_prompts_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    from mlx_lqr.files.prompts import write_prompts

    for number, prompts in enumerate((["one", "two {x}"], ["a\nb", "c"], ['{"prompt": "x"}', "y"], ["\u2028 é", "z"])):
        write_prompts(tmp_path / f"{number}.txt", prompts)
        assert mlx_lqr.read_prompts(tmp_path / f"{number}.txt") == prompts
    with pytest.raises(mlx_lqr.InputError, match="exists already"):
        write_prompts(tmp_path / "0.txt", ["three"])
    write_prompts(tmp_path / "0.txt", ["three"], force=True)
    assert mlx_lqr.read_prompts(tmp_path / "0.txt") == ["three"]
