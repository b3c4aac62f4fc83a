"""How long until the first word, from the start of the process to the first text on stdout, ours and others'; how fast
words come from there on; and how much memory each program takes.

    python benchmarks/startup.py
    python benchmarks/startup.py --rounds 9 -c dog.safetensors:2    # steered as well
    python benchmarks/startup.py --backends -c dog.safetensors:2    # MLX, torch and llama.cpp: the table of the docs

Every round starts every program once, in turn, on SmolLM2 and one prompt; ratios are medians over rounds. The files are
in the system's cache: a round that does not count has read them. llama.cpp takes part where llama-cpp-python is
installed; it reads the GGUF file that our model was converted from.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import click
from report import ratio, say

from mlx_lqr.convert.sources import demo_gguf, demo_model

PROMPT = "Once upon a time, in a small town by a river,"
OURS, OURS_ON_LLAMA, OUR_COMMAND, MLX_LM, LLAMA = (
    "python -m mlx_lqr.runtime",
    "python -m mlx_lqr.runtime, the GGUF file",
    "mlx-lqr generate",
    "python -m mlx_lm generate",
    "llama.cpp",
)
HEADER = {MLX_LM: b"==========\n"}
"""What stands on stdout before the text."""
LLAMA_PROGRAM = """
import os, sys
import llama_cpp.llama_cpp as low
from llama_cpp import Llama
parameters = low.llama_model_default_params()
parameters.use_extra_bufts = b"AMX_INT8 = 1" not in low.llama_print_system_info()  # it crashes there
low.llama_model_default_params = lambda: parameters

llama = Llama(sys.argv[1], n_threads=os.cpu_count(), verbose=False)
for part in llama.create_completion(sys.argv[2], max_tokens=int(sys.argv[3]), temperature=0.0, stream=True):
    print(part["choices"][0]["text"], end="", flush=True)
"""


TOKENS = 49
"""What the programs of the table write"""


class Run(NamedTuple):
    """One run of a program."""

    first: float
    """Seconds from the start of the process to the first text"""
    writing: float
    """Seconds from there to the last text"""
    resident: float
    """The most memory that it has had resident, in MB; a file that it maps counts as far as it is read"""


def run(command: list[str], header: bytes = b"") -> Run:
    """Run a program to its end; `header` stands before the text."""
    read, first, last = b"", 0.0, 0.0
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        while part := os.read(process.stdout.fileno(), 4096):
            read += part
            last = time.perf_counter()
            if not first and len(read) > len(header):
                first = last
        process.stdout.close()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or not first or not read.startswith(header):
            errors.seek(0)
            said = errors.read().decode()[-500:]
            raise click.ClickException(f"{' '.join(command[:4])} failed: {said}")
    resident = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)
    return Run(first - start, last - first, resident)


def programs(folder: Path, gguf: Path | None, controllers: tuple[str, ...]) -> dict[str, list[str]]:
    """The commands that print one token after the prompt."""
    python = sys.executable
    steered = [part for text in controllers for part in ("-c", text)]
    ours = [str(folder), "-p", PROMPT, "-n", "1", "--temperature", "0", *steered]
    mlx_lm = ["--model", str(folder), "--prompt", PROMPT, "--max-tokens", "1", "--ignore-chat-template"]
    commands = {
        OURS: [python, "-m", "mlx_lqr.runtime", *ours],
        OUR_COMMAND: [python, "-c", "from mlx_lqr.commands import main; main()", "generate", *ours],
        MLX_LM: [python, "-m", "mlx_lm", "generate", *mlx_lm],
    }
    if gguf is not None:
        commands[OURS_ON_LLAMA] = [python, "-m", "mlx_lqr.runtime", str(gguf), *ours[1:], "--backend", "llama"]
        commands[LLAMA] = [python, "-c", LLAMA_PROGRAM, str(gguf), PROMPT, "1"]
    return commands


def backend_programs(folder: Path, gguf: Path | None, controllers: tuple[str, ...]) -> dict[str, list[str]]:
    """The commands that write `TOKENS` tokens, on each backend not steered and steered, and llama.cpp by itself."""
    steered = [part for text in controllers for part in ("-c", text)]
    models = {"MLX": (folder, "mlx"), "torch": (folder, "torch")}
    if gguf is not None:
        models["llama.cpp"] = gguf, "llama"
    commands = {}
    for title, (model, backend) in models.items():
        ours = [sys.executable, "-m", "mlx_lqr.runtime", str(model), "--backend", backend, "-p", PROMPT]
        ours += ["-n", str(TOKENS), "--temperature", "0"]
        commands[title] = ours
        commands[f"{title}, steered"] = [*ours, *steered]
    if gguf is not None:
        commands["llama-cpp-python itself"] = [sys.executable, "-c", LLAMA_PROGRAM, str(gguf), PROMPT, str(TOKENS)]
    return commands


def in_turn(commands: Mapping[str, list[str]], rounds: int) -> dict[str, list[Run]]:
    """The runs of every program; those of a first round do not count."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            one = run(command, HEADER.get(name, b""))
            if number:
                runs[name].append(one)
    return runs


def say_table(runs: Mapping[str, list[Run]]) -> None:
    """Medians, in Markdown."""
    print("| | to the first token | a token after it | tokens/s | speed steered over not | resident |")
    print("|---|---|---|---|---|---|")
    for name, own in runs.items():
        first, pace = (statistics.median(values) for values in ([one.first for one in own], paces(own)))
        plain = runs.get(name.removesuffix(", steered")) if name.endswith(", steered") else None
        cost = f"{ratio(paces(plain), paces(own)):.2f}" if plain else ""
        resident = statistics.median(one.resident for one in own)
        print(f"| {name} | {first:.2f} s | {1e3 * pace:.1f} ms | {1 / pace:.0f} | {cost} | {resident:.0f} MB |")


def paces(runs: list[Run]) -> list[float]:
    """Seconds a token after the first of `TOKENS`."""
    return [one.writing / (TOKENS - 1) for one in runs]


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("-c", "--controller", "controllers", multiple=True, metavar="FILE[:STRENGTH]", help="Steer ours with it.")
@click.option("--backends", is_flag=True, help="Compare our backends, not steered and with -c, in one table.")
def main(rounds: int, controllers: tuple[str, ...], backends: bool) -> None:
    """Measure start-up on SmolLM2-135M-Instruct."""
    if backends and not controllers:
        raise click.UsageError("--backends needs a controller: -c FILE[:STRENGTH]")
    with ExitStack() as stack:
        gguf = None
        if importlib.util.find_spec("llama_cpp") is not None:
            gguf = stack.enter_context(demo_gguf())
        else:
            print("llama.cpp is left out: llama-cpp-python is not installed")
        if backends:
            say_table(in_turn(backend_programs(demo_model(), gguf, controllers), rounds))
            return
        runs = in_turn(programs(demo_model(), gguf, controllers), rounds)
    first = {name: [one.first for one in own] for name, own in runs.items()}
    targets = {OURS: "at most 2", OUR_COMMAND: "at most 3", OURS_ON_LLAMA: "at most 0.6"}
    for name, seconds in first.items():
        say(name, statistics.median(seconds), "s", targets.get(name, ""))
    for name in first.keys() - targets.keys():
        say(f"{name} takes longer than ours by", ratio(first[name], first[OURS]), "x")
    for name, own in runs.items():
        say(f"{name}: resident", statistics.median(one.resident for one in own), "MB")


if __name__ == "__main__":
    main()
