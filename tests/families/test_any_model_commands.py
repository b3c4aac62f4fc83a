"""Every command and every task with models that are on no list."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.architectures import folder_of
from helpers.command_line import refused, run

FAMILIES = ["qwen3_next", "lfm2", "llama4"]
SETS = "--concept", "own", "--positive", "one.txt", "--negative", "rest.txt"
SMALL = "--limit", 2, "--samples", 1, "-n", 3, "--capability", "questions.jsonl"
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompt": "w1 w2"}, {"prompt": "w3"}, {"prompt": "w5 w6 w7"}],
    "questions": [{"prompt": "w1 w2", "answer": "w3", "others": ["w4"]}],
    "asked": [{"question": "w1", "best_answer": "w3", "correct_answers": ["w4 w5"], "incorrect_answers": ["w6"]}],
    "requests": [
        {"prompt": "w1 w2", "type": "a", "label": "safe"},
        {"prompt": "w5 w2", "type": "b", "label": "unsafe"},
    ],
}
TASKS: dict[str, Sequence[str]] = {
    "concept": ("--words", "w1*,w2"),
    "toxicity": ("--data", "prompts.jsonl", "--scorer", "helpers.command_line:scored"),
    "truthfulness": ("--data", "asked.jsonl"),
    "refusal": ("--data", "requests.jsonl"),
}
HEADS = {"llama4"}
"""Families all of whose blocks have attention heads, which `iti` moves"""
METHODS = ("alqr", "spid", "ablation", "linear-act", "odesteer", "adaptive-angular", "pca")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with the models and what the commands read, which is the current one."""
    place = tmp_path_factory.mktemp("commands")
    (place / "one.txt").write_text("w1 w2 w3\nw4 w5 w6\nw7 w8\n")
    (place / "rest.txt").write_text("w9 w10 w11\nw12 w13\nw14 w15 w16\n")
    for name, rows in ROWS.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("MLX_LQR_CACHE", str(place / "cache"))
        yield place


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, place: Path) -> Path:
    family: str = request.param
    folder = folder_of(family, place / family)
    for method in METHODS:
        done("fit", folder, "--method", method, *SETS, "-o", f"{family}/{method}.st")
    done("fit", folder, "--cost", "adaptive", "--layers", "all", *SETS, "-o", f"{family}/adaptive.st")
    return folder


every = pytest.mark.parametrize("folder", FAMILIES, indirect=True)


def done(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, (arguments, result.output, result.exception)
    return result.stdout


@every
def test_all_commands_that_steer(folder: Path) -> None:
    refusal = None if folder.name in HEADS else refused("fit", folder, "--method", "iti", *SETS, "-o", "iti.st")
    assert refusal is None or "without self_attn.o_proj: use a method that acts on whole blocks" in refusal
    if refusal is None:
        done("fit", folder, "--method", "iti", "--heads", 2, *SETS, "-o", folder / "iti.st")
    for method in (*METHODS, "adaptive"):
        done("generate", folder, "-c", f"{folder}/{method}.st:2", "-p", "w1 w2 w3", "-n", 3, "--seed", 1)
    done("linearize", folder, "--prompts", "prompts.jsonl", "-o", folder / "jacobians.st")
    done("fit", folder, "--jacobians", folder / "jacobians.st", *SETS, "-o", folder / "again.st")
    tracked = done(
        "generate", folder, "-c", f"{folder}/alqr.st:2", "-p", "w1", "-n", 3, "--temperature", 0, "--json", "--track"
    )
    assert json.loads(tracked)["tokens"]


@every
def test_all_tasks_and_what_measures(folder: Path) -> None:
    steering = "-c", f"{folder}/alqr.st:2"
    for task, options in TASKS.items():
        done("eval", task, folder, *steering, *options, "-o", folder / task, *SMALL)
    several = [part for method in METHODS for part in ("-c", f"{folder}/{method}.st")]
    options = *TASKS["concept"], "--strengths", 1, *SMALL, "--json"
    compared = json.loads(done("compare", "concept", folder, *several, *options, "-o", folder / "compared"))
    assert compared
    tuned = "tune", "concept", folder, *SETS, *TASKS["concept"], "--evaluations", 2, "--at-most", 100, *SMALL
    result = run(*tuned, "-o", folder / "tuned.st")
    assert result.exit_code == 0 or "more prevalence than the unsteered model" in result.stderr, result.output
    done("linearity", folder, *steering, "--prompts", "prompts.jsonl", "--modes", 2)
    done("certify", folder, *steering, "--prompts", "prompts.jsonl")
