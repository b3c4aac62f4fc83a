"""`python -m mlx_lqr.runtime`: the library's answer with hardly anything installed, and a command that behaves."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.platforms import posix

import mlx_lqr
from mlx_lqr.backends.protocol import Model
from mlx_lqr.convert.sources import demo_model

PROMPT = "Once upon a time,"
NOT_NEEDED = (
    *("click", "gguf", "huggingface_hub", "prompt_toolkit", "requests", "rich", "scipy", "threadpoolctl", "torch"),
    *("tqdm", "transformers", "yaml"),
)
PROGRAM = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({NOT_NEEDED}))  # as if they were not installed
runpy.run_module("mlx_lqr.runtime", run_name="__main__", alter_sys=True)
"""


LEAST = {"llama_cpp", "numpy", *("jinja2", "markupsafe", "typing_extensions", "diskcache"), "mlx_lqr"}
"""llama-cpp-python with what it depends on, and ourselves"""
LEAST_PROGRAM = f"""
import runpy, sys

class Sparing:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in {LEAST} or top.startswith("__editable__"):
            return self.finder.find_spec(name, path, target)

    def find_distributions(self, *context):
        return getattr(self.finder, "find_distributions", lambda *_: ())(*context)

sys.meta_path[:] = map(Sparing, sys.meta_path)
runpy.run_module("mlx_lqr.runtime", run_name="__main__", alter_sys=True)
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *map(str, arguments)]


def run(*arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, input=text, check=False)


@pytest.fixture(scope="module")
def sea(tmp_path_factory: pytest.TempPathFactory, smollm2: Model) -> Path:
    """The file of a controller that is quickly made."""
    positive, negative = mlx_lqr.bundled_prompts("ocean")
    controller = mlx_lqr.fit(smollm2, positive[:6], negative[:6], concept="ocean", cost="feature")
    file = tmp_path_factory.mktemp("sea") / "sea.safetensors"
    controller.save(file)
    return file


def test_the_light_runtime_says_what_the_library_says(sea: Path, smollm2: Model) -> None:
    controller = mlx_lqr.Controller.load(sea)
    options: mlx_lqr.Options = {"max_tokens": 12, "temperature": 1.0, "top_k": 50, "seed": 3, "stop": "."}
    expected = mlx_lqr.generate(smollm2, PROMPT, controller=controller, strength=2.0, **options)
    sampling = "-n", 12, "--temperature", 1, "--top-k", 50, "--seed", 3, "--stop", "."
    done = run(demo_model(), "-p", PROMPT, "-c", f"{sea}:2", *sampling)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected + "\n", "")


def test_the_chat_template_is_applied_when_asked_for(smollm2: Model) -> None:
    question = "What lives in the sea?"
    tokens = smollm2.tokenizer.chat([{"role": "user", "content": question}])
    expected = mlx_lqr.generate(smollm2, tokens, max_tokens=8, temperature=0)
    assert run("demo", "--chat", "-n", 8, "--temperature", 0, text=question).stdout == expected + "\n"


def test_a_gguf_file_runs_with_llama_cpp_and_numpy_alone(sea: Path, smollm2_gguf: Path) -> None:
    pytest.importorskip("llama_cpp")
    controller, options = mlx_lqr.Controller.load(sea), {"max_tokens": 8, "temperature": 0.0}
    model = mlx_lqr.load(smollm2_gguf, backend="llama")
    question = model.tokenizer.chat([{"role": "user", "content": "What is blue?"}])
    steered = mlx_lqr.generate(model, question, controller=controller, strength=2.0, **options)
    assert steered != mlx_lqr.generate(model, question, **options)
    least = [sys.executable, "-c", LEAST_PROGRAM, str(smollm2_gguf), "--chat", "-p", "What is blue?"]
    least += ["-c", f"{sea}:2", "-n", "8", "--temperature", "0"]
    done = subprocess.run(least, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, steered + "\n", ""), done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo", "-p", "x", "-c", "missing.safetensors:2"], "no file missing"),
        (["demo", "-p", "x", "-c", "{sea}:lots"], "strength must be a number"),
        (["demo", "-p", "x", "-n", "0"], "max_tokens"),
        (["demo", "-p", "x", "-n", "many"], "many"),
        (["demo", "-p", ""], "empty"),
        (["missing.gguf", "-p", "x"], "missing.gguf does not exist"),
        (["some/model", "-p", "x"], "needs the package huggingface_hub"),
        (["-p", "x"], "model"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments: list[str], says: str, sea: Path) -> None:
    done = run(*(argument.replace("{sea}", str(sea)) for argument in arguments))
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith("Error: ")
    assert says in line


@posix
@pytest.mark.parametrize("ending", ["Ctrl-C", "closed pipe"])
def test_an_answer_may_be_cut_short(ending: str) -> None:
    arguments = command("demo", "-p", PROMPT, "-n", 4000)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1)  # the answer has begun
    if ending == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    else:
        process.stdout.close()
    started = time.monotonic()
    assert process.wait(timeout=60) == (130 if ending == "Ctrl-C" else 0)
    assert time.monotonic() - started < 10
    assert process.stderr.read() == ""
