"""`mlx-lqr tune`: a controller file with its strength, everything kept, and every mistake in its options."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.backends import tiny_folder
from helpers.command_line import refused, run
from tokenizers import Tokenizer, models, pre_tokenizers

import mlx_lqr
from mlx_lqr.methods.steering import load_steering
from mlx_lqr.tasks.concept import bundled_openings
from mlx_lqr.tasks.generations import Generations

POSITIVE = ["w1 w2 w3", "w1 w4", "w2 w1 w5", "w6 w1"]
NEGATIVE = ["w7 w8 w9", "w10 w4", "w12 w11 w5", "w6 w13"]
SMALL = "--samples", 2, "-n", 6, "--top-p", 1, "--temperature", 1


@pytest.fixture(scope="module")
def tiny_model() -> Path:
    """The folder of a tiny model that reads and writes words w0 to w63."""
    folder = tiny_folder("llama")
    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def command(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A small search in a folder of its own, which is the current one."""
    for name, texts in (("one", POSITIVE), ("rest", NEGATIVE), ("openings", ["w20 w21", "w22", "w23 w24 w25"])):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts))
    (tmp_path / "questions.jsonl").write_text('{"prompt": "w1 w2", "answer": "w3", "others": ["w4"]}\n')
    monkeypatch.chdir(tmp_path)
    sets = "--positive", "one.txt", "--negative", "rest.txt", "--capability", "questions.jsonl"
    words = "--words", "w21,w32,w36,w37,w52", "--openings", "openings.txt"
    return ["tune", "concept", tiny_model, *sets, *words, *SMALL, "-o", "out/one.safetensors"]


def test_tune_writes_a_controller_with_its_strength_and_keeps_every_evaluation(
    command: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command += ["--evaluations", 5, "--at-most", 3, "--feedback", 1, "--strengths", "0,6"]
    done = run(*command, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads(done.stdout)
    best, trials = result["best"], result["trials"]
    assert len(trials) == 5
    assert best in trials
    assert best["within"]
    controller = mlx_lqr.Controller.load("out/one.safetensors")
    assert controller.strength == (best["strength"],)
    assert controller.concepts == ("one",)
    assert controller.weights.q == best["options"]["q"]
    assert controller.cost == best["options"]["cost"]
    folder = tmp_path / "out/one-tuning"
    kept = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert [{key: line[key] for key in trial} for line, trial in zip(kept, trials, strict=True)] == trials
    rows = [line for file in folder.glob("concept-*.jsonl") for line in file.read_text().splitlines()[1:]]
    assert len(rows) == 6 * 6  # of five trials and the unsteered model; nothing but the texts is measured
    monkeypatch.setattr(Generations, "rows", None)
    monkeypatch.setattr("mlx_lqr.commands.tune.linearize", None)
    table = run(*command).stdout
    assert "perplexity times the unsteered model's, at most 3 allowed" in table
    assert sum(line.endswith("best") for line in table.splitlines()) == 1
    assert f"Recommended: {best['candidate']}, strength {best['strength']:g}" in table
    assert table.splitlines()[-1].endswith("-c out/one.safetensors")
    given = "-p", "w1 w2", "-n", 4, "--seed", 1, "-c", "out/one.safetensors"
    text = run("generate", command[2], *given, "--json").stdout
    assert json.loads(text)["concepts"] == {"one": best["strength"]}


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_another_method_damage_and_range(command: list[Any], backend: str) -> None:
    options = "--method", "proportional", "--damage", "kl", "--at-most", 2, "--strengths", "0,-4", "--evaluations", 3
    done = run(*command, *options, "--backend", backend, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads(done.stdout)
    assert all(-4 <= trial["strength"] < 0 for trial in result["trials"])
    assert result["unsteered"]["kl"]["value"] == 0
    steering = load_steering("out/one.safetensors")
    assert isinstance(steering, mlx_lqr.Baseline)
    assert steering.method == "proportional"
    assert steering.strength == (result["best"]["strength"],)
    assert "capability" not in result["unsteered"]
    table = run(*command, *options, "--backend", backend).stdout
    assert "relative: how much worse kl is than the unsteered model's, at most 2 allowed" in table
    assert "perplexity" not in table


def test_what_is_given_is_held_fixed_and_not_searched(command: list[Any], tmp_path: Path) -> None:
    given = "--layers", "1-2", "--q", 2, "--r", 0.5, "--qf", 4, "--cost", "feature"
    done = run(*command, *given, "--evaluations", 8, "--at-most", 3, "--json")
    trials = json.loads(done.stdout)["trials"]
    assert 2 <= len(trials) <= 8
    for trial in trials:
        assert trial["options"].keys() == {"layers", "q", "setpoint", "cost", "readout"}
        assert (trial["options"]["layers"], trial["options"]["q"], trial["options"]["cost"]) == ("1-2", 2, "feature")
    assert {trial["options"]["setpoint"] for trial in trials} == {"centred", "paper"}
    for file in (tmp_path / "out/one-tuning").glob("*.safetensors"):
        if not file.name.startswith("jacobians"):
            controller = mlx_lqr.Controller.load(file)
            assert controller.active_layers == (1, 2)
            assert controller.cost == "feature"
            weights = controller.weights
            assert (weights.q, weights.r, weights.qf) == (2.0, 0.5, 4.0)
    kept = [json.loads(line) for line in (tmp_path / "out/one-tuning/trials.jsonl").read_text().splitlines()]
    assert all(row["settings"]["fixed"] == {"r": 0.5, "qf": 4.0} for row in kept)


def test_another_methods_options_are_held_fixed_too(command: list[Any]) -> None:
    given = "--method", "proportional", "--kp", 0.7, "--evaluations", 8, "--at-most", 3
    done = run(*command, *given, "--json")
    trials = json.loads(done.stdout)["trials"]
    assert {trial["options"]["kp"] for trial in trials} == {0.7}
    assert len({trial["options"]["layers"] for trial in trials}) > 1
    places = run(*command, *given, "--layers", "auto", "--json")
    assert {trial["options"]["layers"] for trial in json.loads(places.stdout)["trials"]} == {"auto"}


@pytest.mark.parametrize("words", ["w99", "w*"])
def test_what_changes_nothing_is_not_recommended(words: str, command: list[Any]) -> None:
    """Where the unsteered model never names the concept, or always does, and no trial more often."""
    command[command.index("--words") + 1] = words
    result = run(*command, "--evaluations", 2, "--at-most", 3)
    assert result.exit_code == 2
    assert "more prevalence than the unsteered model" in result.stderr
    assert "Recommended" not in result.stdout
    assert not Path("out/one.safetensors").exists()


def test_nothing_within_the_limit_is_said_and_nothing_is_written(command: list[Any]) -> None:
    result = run(*command, "--evaluations", 2, "--at-most", 1.000001, "--strengths", "90,100")
    assert result.exit_code == 2
    assert "no trial was within the limit (perplexity, 1)" in result.stderr
    assert "Recommended" not in result.stdout
    assert len(result.stdout.splitlines()) > 3
    assert not Path("out/one.safetensors").exists()


def test_the_concept_task_is_tuned_on_openings_of_its_own(command: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    module = importlib.import_module("mlx_lqr.tasks.concept")  # the attribute of this name is the function
    monkeypatch.setattr(module, "concept", lambda words, openings, **_: seen.append(openings))
    at = command.index("--openings")
    run(*command[:at], *command[at + 2 :])
    assert seen[0] == bundled_openings("tuning")
    run("eval", "concept", "demo", "--words", "w1", "-o", "elsewhere")
    assert seen[1] == bundled_openings()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--at-most", "0.9"], "above 1"),
        (["--damage", "kl", "--at-most", "0"], "above 0"),
        (["--control", "charm"], "charm"),
        (["--damage", "charm"], "charm"),
        (["--evaluations", "0"], "evaluations"),
        (["--strengths", "1,2,3"], "two different numbers"),
        (["--strengths", "2,2"], "two different numbers"),
        (["--strengths", "lots"], "strengths must look like"),
        (["--method", "actadd", "--jacobians", "one.txt"], "not for the method actadd"),
        (["--jacobians", "one.txt"], "damaged"),
        (["--jacobian-prompts", "0"], "at least 1"),
        (["--kp", "1"], "--kp is not for the method alqr: it belongs to proportional, spid, pid-act"),
        (["--method", "actadd", "--q", "1"], "--q is not for the method actadd: it belongs to alqr"),
        (["--q", "-1"], "q"),
        (["--layers", "all the best"], "layers must look like"),
        (["--positive", "missing.txt"], "missing.txt"),
        (["--words", "*"], "words must look like"),
        (["-o", "."], "is a folder"),
    ],
)
def test_mistakes(options: list[str], says: str, command: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_lqr.commands.task_options.load", None)  # refused before any model is loaded
    assert says in refused(*command, *options)
    assert not Path("out").exists()


@pytest.mark.slow
def test_tune_on_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openings.txt").write_text("\n".join(bundled_openings("tuning")[:4]))
    question = {"prompt": "The capital of France is", "answer": " Paris", "others": [" a fish", " blue", " seven"]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question))
    small = "--capability", "questions.jsonl", "--openings", "openings.txt", "--samples", 2, "-n", 20
    options = *small, "--concept", "dog", "--jacobian-prompts", 1, "--evaluations", 3
    done = run("tune", "concept", "demo", *options, "-o", "dog.safetensors", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads(done.stdout)
    assert result["trials"][0]["options"]["layers"] == "auto"
    controller = mlx_lqr.Controller.load("dog.safetensors")
    assert min(controller.active_layers) >= 20
    assert 0 < controller.strength[0] <= 6  # type: ignore[index]
    assert result["best"]["control"]["value"] >= result["unsteered"]["prevalence"]["value"]
    assert result["best"]["relative"] <= 1.3
