"""The command line as a person uses it, and every mistake we know of: one line, exit status 2, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.command_line import refused, run
from helpers.platforms import posix

import mlx_lqr
from mlx_lqr.backends.protocol import Model
from mlx_lqr.convert.sources import demo_model


@pytest.fixture(scope="module")
def dog(tmp_path_factory: pytest.TempPathFactory, smollm2: Model) -> Path:
    """A controller file made by `fit` from small prompt files."""
    folder = tmp_path_factory.mktemp("dog")
    positive, negative = mlx_lqr.bundled_prompts("dog")
    (folder / "dog.txt").write_text("\n".join(positive[:6]))
    (folder / "rest.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in negative[:6]))
    options = "--q", 1, "--qf", 1, "--layers", "20-29", "--jacobian-prompts", 1
    result = run(
        "fit",
        "demo",
        "-o",
        folder / "dog.safetensors",
        "--positive",
        folder / "dog.txt",
        "--negative",
        folder / "rest.jsonl",
        *options,
    )
    assert result.exit_code == 0, result.output
    return folder / "dog.safetensors"


def test_fit_then_show(dog: Path) -> None:
    shown = json.loads(run("show", dog, "--json").stdout)
    assert shown["concepts"] == ["dog"]
    assert shown["layers"] == list(range(20, 30))
    assert (shown["T"], shown["d"], shown["q"], shown["prompt_counts"]) == (30, 576, 1.0, [[6, 6]])
    text = run("show", dog).stdout
    assert "dog (6 + 6 prompts)" in text
    assert text.count("no control") == 20


def test_jacobians_are_stored_and_used(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A short one.\n")
    stored = tmp_path / "jacobians.safetensors"
    assert run("linearize", "demo", "-o", stored, "--prompts", prompts).exit_code == 0
    assert len(mlx_lqr.Jacobians.load(stored)) == 30
    (tmp_path / "a.txt").write_text("The dog barks.\n")
    (tmp_path / "b.txt").write_text("The bell rings.\n")
    sets = "--positive", tmp_path / "a.txt", "--negative", tmp_path / "b.txt"
    result = run("fit", "demo", "-o", tmp_path / "c.safetensors", *sets, "--jacobians", stored)
    assert result.exit_code == 0, result.output
    assert mlx_lqr.Controller.load(tmp_path / "c.safetensors").jacobian_prompts == 1


def test_concepts_are_listed_with_an_example() -> None:
    text = run("concepts").stdout
    for name in mlx_lqr.bundled_concepts():
        assert f"{name}  (" in text
        assert mlx_lqr.bundled_prompts(name)[0][0] in text


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no-such-folder" in refused("generate", "no-such-folder", "-p", "x")
    assert "missing.gguf" in refused("generate", "missing.gguf", "-p", "x")
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt is no model" in refused("generate", tmp_path / "notes.txt", "-p", "x")
    assert "config.json" in refused("generate", tmp_path, "-p", "x")


def test_no_network(tmp_path: Path) -> None:
    """A hub model that is not in the hub's cache, and the demonstration model where nothing is cached or installed."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
        "MLX_LQR_CACHE": str(tmp_path / "cache"),
    }
    for model in ("nobody/no-model", "demo"):
        command = [sys.executable, "-c", "from mlx_lqr.commands import main; main()", "generate", model, "-p", "x"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 2
        assert done.stdout == ""
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
        assert "network" in line
        assert "Traceback" not in done.stderr


def damaged_copy(tmp_path: Path, name: str, content: bytes | None) -> Path:
    """The demonstration model's folder with one file replaced or (None) left out."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in demo_model().iterdir():
        if file.name != name:
            (copy / file.name).symlink_to(file)
    if content is not None:
        (copy / name).write_bytes(content)
    return copy


def test_damaged_model_folders(tmp_path: Path, smollm2: Model) -> None:
    weights = (demo_model() / "model.safetensors").read_bytes()
    config = json.loads((demo_model() / "config.json").read_text())

    def says(name: str, content: bytes | None) -> str:
        copy = damaged_copy(tmp_path, name, content)
        try:
            return refused("generate", copy, "-p", "x")
        finally:
            shutil.rmtree(copy)

    assert "model.safetensors" in says("model.safetensors", weights[: len(weights) // 2])
    assert "model.safetensors" in says("model.safetensors", b"\xff" * 64)
    assert "no model*.safetensors" in says("model.safetensors", None)
    assert "config.json" in says("config.json", b"{half")
    assert "tokenizer.json" in says("tokenizer.json", None)
    assert "tokenizer.json" in says("tokenizer.json", b"{}")
    assert "'florp' is not supported" in says("config.json", json.dumps({**config, "model_type": "florp"}).encode())
    assert "do not fit" in says("config.json", json.dumps({**config, "num_hidden_layers": 3}).encode())
    assert "do not fit" in says("config.json", json.dumps({"model_type": "llama"}).encode())
    assert "which is never run" in says("config.json", json.dumps({**config, "model_file": "evil.py"}).encode())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--concept", "unicorn"], "no bundled concept"),
        ([], "name a bundled --concept"),
        (["--positive", "{one}"], "both"),
        (["--positive", "{one}", "--negative", "{one}"], "the same"),
        (["--positive", "{empty}", "--negative", "{one}"], "no prompts"),
        (["--positive", "missing.txt", "--negative", "{one}"], "missing.txt"),
        (["--concept", "dog", "--q", "-1"], "negative"),
        (["--concept", "dog", "--r", "0"], "r must be above"),
        (["--concept", "dog", "--r", "-3"], "r must be above"),
        (["--concept", "dog", "--q", "nan"], "finite"),
        (["--concept", "dog", "--layers", "a-b"], "layers must look like"),
        (["--concept", "dog", "--layers", "99"], "between 0 and 29"),
        (["--concept", "dog", "--positions", "some"], "some"),
        (["--concept", "dog", "--setpoint", "some"], "some"),
        (["--concept", "dog", "--jacobian-prompts", "0"], "jacobian_prompts"),
        (["--concept", "dog", "--jacobians", "{one}"], "damaged"),
    ],
)
def test_mistakes_in_fit(options: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("One sentence.\n")
    (tmp_path / "empty.txt").write_text("\n")
    places = {f"{{{name}}}": str(tmp_path / f"{name}.txt") for name in ("one", "empty")}
    out = tmp_path / "out.safetensors"
    assert says in refused("fit", "demo", "-o", out, *(places.get(option, option) for option in options))
    assert not out.exists()


def test_a_controller_of_another_model(dog: Path, tmp_path: Path) -> None:
    other = mlx_lqr.Controller.load(dog)
    replace(other, fingerprint="0" * 16).save(tmp_path / "other.safetensors")
    assert "was fitted on" in refused("generate", "demo", "-p", "x", "-c", tmp_path / "other.safetensors")
    assert "was fitted on" in refused("chat", "demo", "-c", tmp_path / "other.safetensors", text="hi\n")


def test_damaged_controller_files(dog: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    half.write_bytes(dog.read_bytes()[:1000])
    assert "half.safetensors" in refused("show", half)
    assert "not a controller" in refused("show", demo_model() / "model.safetensors")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for command in (["fit", "demo", "--concept", "dog"], ["linearize", "demo"]):  # refused before any work is done
        assert "cannot write" in refused(*command, "-o", tmp_path / "file" / "x.safetensors")
        assert "is a folder" in refused(*command, "-o", tmp_path)


@posix
def test_ctrl_c_during_a_conversion_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "model"
    command = [sys.executable, "-c", "from mlx_lqr.commands import main; main()", "convert", demo_model(), out]
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.safetensors*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_python_runs_the_package() -> None:
    """`python -m mlx_lqr`, with its exit status."""
    command = [sys.executable, "-m", "mlx_lqr"]
    listed = subprocess.run([*command, "concepts"], capture_output=True, text=True)
    assert (listed.returncode, "ocean" in listed.stdout) == (0, True)
    refused = subprocess.run([*command, "show", "nowhere"], capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "nowhere" in refused.stderr


def test_the_launcher_of_the_checkout(tmp_path: Path) -> None:
    launcher = Path(__file__).parents[2] / "cli.py"
    done = subprocess.run(
        [sys.executable, launcher, "concepts"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout == run("concepts").stdout


@posix
def test_output_may_be_cut_short() -> None:
    program = f"{sys.executable} -c 'from mlx_lqr.commands import main; main()'"
    done = subprocess.run(f"{program} concepts | head -n 1", shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_demo_shows_samples_and_tracking_and_keeps_its_controller(
    smollm2: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "SmolLM2-135M-Instruct").symlink_to(demo_model())
    monkeypatch.setenv("MLX_LQR_CACHE", str(tmp_path))
    few = [texts[:8] for texts in mlx_lqr.bundled_prompts("dog")]
    monkeypatch.setattr(sys.modules["mlx_lqr.commands.kept_controllers"], "bundled_prompts", lambda concept: few)
    first = run("demo", "-n", "4")
    assert first.exit_code == 0, first.output
    samples = dict(line[1:].split("] ", 1) for line in first.stdout.splitlines() if line.startswith("["))
    titles = [line[1:].partition("]")[0].partition(":")[0] for line in first.stdout.splitlines() if line[:1] == "["]
    budgets = ["not steered", "dog, gentle", "dog, normal", "dog, strong"]
    assert titles == 2 * budgets  # of a text, and of an answer in the chat
    assert len(set(samples.values())) > 1
    rows = [line.split() for line in first.stdout.splitlines() if line.lstrip()[:2].isdigit()]
    (kept,) = (tmp_path / "controllers").glob("*.safetensors")
    assert [int(row[0]) for row in rows] == list(mlx_lqr.Controller.load(kept).active_layers)
    written = kept.stat().st_mtime_ns
    assert run("demo", "-n", "4").stdout == first.stdout
    assert kept.stat().st_mtime_ns == written
