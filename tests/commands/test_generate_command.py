"""`mlx-lqr generate`: one prompt or many, as text or as JSON, and every mistake in its options."""

from __future__ import annotations

import importlib  # `mlx_lqr.runtime.generate` as an attribute is the function
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import PROMPT, PROMPTS, answers, refused, run

import mlx_lqr
from mlx_lqr.analysis.tracking import track
from mlx_lqr.backends.protocol import Model
from mlx_lqr.errors import InputError


def test_generate_says_what_the_library_says(dog: Path, smollm2: Model) -> None:
    controller = mlx_lqr.Controller.load(dog)
    expected = mlx_lqr.generate(smollm2, PROMPT, controller=controller, strength=3.0, max_tokens=8, temperature=0)
    plain = mlx_lqr.generate(smollm2, PROMPT, max_tokens=8, temperature=0)
    assert expected != plain
    assert (
        run("generate", "demo", "-p", PROMPT, "-n", 8, "-c", f"{dog}:3", "--temperature", 0).stdout == expected + "\n"
    )
    assert run("generate", "demo", "-n", 8, "--temperature", 0, text=PROMPT).stdout == plain + "\n"
    (answer,) = answers("-p", PROMPT, "-n", 8, "-c", f"{dog}:3")
    assert answer["text"] == expected == smollm2.tokenizer.decode(answer["tokens"])
    assert answer["concepts"] == {"dog": 3.0}
    assert len(answer["tokens"]) == 8


def test_every_decoding_option_arrives(smollm2: Model) -> None:
    options: mlx_lqr.Options = {
        "max_tokens": 12,
        "temperature": 1.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.2,
        "seed": 5,
    }
    expected = mlx_lqr.generate(smollm2, PROMPT, **options)
    stop = expected[len(expected) // 2 :][:3]
    expected = mlx_lqr.generate(smollm2, PROMPT, **options, stop=stop, overflow="roll")
    written = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    (answer,) = answers("-p", PROMPT, *written, f"--stop={stop}", "--overflow=roll")
    assert answer["text"] == expected
    assert stop not in answer["text"]


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_file_of_prompts_is_answered_as_each_prompt_alone(
    adaptive: bool, dog: Path, prompt_file: Path, smollm2: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("mlx_lqr.runtime.generate"), "BATCH", 2)
    controller = mlx_lqr.Controller.load(dog)
    options: mlx_lqr.Options = {"max_tokens": 6, "temperature": 1.0, "adaptive": adaptive}
    alone = [
        mlx_lqr.generate(smollm2, prompt, controller=controller, strength=2.0, seed=7 + i, **options)
        for i, prompt in enumerate(PROMPTS)
    ]
    arguments = "--prompts", prompt_file, "-n", 6, "--temperature", 1, "--seed", 7, "-c", f"{dog}:2"
    printed = answers(*arguments, *["--adaptive"] * adaptive)
    assert [answer["prompt"] for answer in printed] == PROMPTS
    assert [answer["text"] for answer in printed] == alone
    assert all(answer["concepts"] == {"dog": 2.0} and len(answer["tokens"]) == 6 for answer in printed)
    text = run("generate", "demo", *arguments, *["--adaptive"] * adaptive).stdout
    blocks = zip(PROMPTS, alone, strict=True)
    assert text == "".join(f"[{n}] {prompt}\n{answer}\n\n" for n, (prompt, answer) in enumerate(blocks, 1))


def test_answers_are_printed_as_soon_as_their_batch_is_done(prompt_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **options: Any) -> Iterator[tuple[int, mlx_lqr.Piece]]:
        for i, piece in mlx_lqr.batch_stream(*arguments, **options):
            if i == 2:
                raise InputError("the third fails")
            yield i, piece

    monkeypatch.setattr(importlib.import_module("mlx_lqr.runtime.generate"), "BATCH", 2)
    monkeypatch.setattr(importlib.import_module("mlx_lqr.commands.generate"), "batch_stream", failing)
    result = run("generate", "demo", "--prompts", prompt_file, "-n", 2, "--temperature", 0, "--json")
    assert result.exit_code == 2
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == PROMPTS[:2]


@pytest.mark.parametrize("adaptive", [False, True])
def test_tracking_is_that_of_the_controller_in_use(adaptive: bool, dog: Path, smollm2: Model) -> None:
    (answer,) = answers("-p", PROMPT, "-n", 1, "-c", f"{dog}:2", "--track", *["--adaptive"] * adaptive)
    controller = mlx_lqr.Controller.load(dog)
    used = mlx_lqr.adapt(smollm2, controller, PROMPT) if adaptive else controller
    expected = track(smollm2, PROMPT, used, 2.0)
    tracking = answer["tracking"]["dog"]
    assert tracking["feature"] == pytest.approx(expected.feature[:, 0], rel=1e-4, abs=1e-4)
    assert tracking["setpoint"] == pytest.approx(expected.setpoint[:, 0])
    assert len(tracking["feature"]) == smollm2.num_layers


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-c", "{dog}:lots"], "strength must be a number"),
        (["-c", "{dog}:nan"], "finite"),
        (["-c", "missing.safetensors"], "no file missing"),
        (["-c", "missing.safetensors:2"], "no file missing"),
        (["-c", "{dog}", "-c", "{dog}"], "twice"),
        (["-n", "0"], "max_tokens"),
        (["-n", "many"], "'many'"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "2"], "top_p"),
        (["--top-k", "-1"], "top_k"),
        (["--min-p", "1"], "min_p"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
        (["--frequency-penalty", "2.1"], "frequency_penalty"),
        (["--seed", "-1"], "seed"),
        (["--stop", ""], "stop"),
        (["--overflow", "drop"], "'drop'"),
        (["--dtype", "int3"], "dtype must be"),
        (["--prompts", "missing.txt"], "not both"),
        (["--track", "-c", "{dog}"], "add --json"),
        (["--track", "--json"], "add -c FILE"),
    ],
)
def test_mistakes_in_generate(options: list[str], says: str, dog: Path) -> None:
    options = [option.replace("{dog}", str(dog)) for option in options]
    assert says in refused("generate", "demo", "-p", "x", *options)


@pytest.mark.parametrize("options", [[], ["--overflow", "roll"]])
def test_one_unusable_prompt_is_refused_before_any_answer(options: list[str], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x"}\n{"prompt": ""}\n')
    result = run("generate", "demo", "--prompts", file, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "empty" in result.stderr
    assert "missing.txt" in refused("generate", "demo", "--prompts", "missing.txt", *options)


def test_empty_and_overlong_prompts() -> None:
    assert "empty" in refused("generate", "demo", "-p", "")
    assert "the model's context 8192" in refused("generate", "demo", "-p", "word " * 9000)
    assert "UTF-8" in refused("generate", "demo", "-p", "caf\udce9")
