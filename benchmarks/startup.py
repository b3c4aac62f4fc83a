"""How long until the first word, from the start of the process to the first text on stdout, ours and others'; and how
much memory each program takes.

    python benchmarks/startup.py
    python benchmarks/startup.py --rounds 9 -c dog.safetensors:2    # steered as well

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
import time
from contextlib import ExitStack
from pathlib import Path

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
from llama_cpp import Llama

llama = Llama(sys.argv[1], n_threads=os.cpu_count(), verbose=False)
for part in llama.create_completion(sys.argv[2], max_tokens=1, temperature=0.0, stream=True):
    print(part["choices"][0]["text"], end="", flush=True)
"""


def seconds_to_first_text(command: list[str], header: bytes) -> float:
    """From the start of the process; it has ended before this returns."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        read = b""
        while len(read) <= len(header):
            part = os.read(process.stdout.fileno(), 4096)
            if not part:
                break
            read += part
        taken = time.perf_counter() - start
        _, errors = process.communicate()
    if process.returncode or len(read) <= len(header) or not read.startswith(header):
        raise click.ClickException(f"{' '.join(command[:4])} failed: {errors.decode()[-500:]}")
    return taken


def largest_resident(command: list[str]) -> float:
    """The most memory that a program has had resident, in MB; a file that it maps counts as far as it is read."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{' '.join(command[:4])} failed")
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


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
        commands[LLAMA] = [python, "-c", LLAMA_PROGRAM, str(gguf), PROMPT]
    return commands


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("-c", "--controller", "controllers", multiple=True, metavar="FILE[:STRENGTH]", help="Steer ours with it.")
def main(rounds: int, controllers: tuple[str, ...]) -> None:
    """Measure start-up on SmolLM2-135M-Instruct."""
    with ExitStack() as stack:
        gguf = None
        if importlib.util.find_spec("llama_cpp") is not None:
            gguf = stack.enter_context(demo_gguf())
        else:
            print("llama.cpp is left out: llama-cpp-python is not installed")
        commands = programs(demo_model(), gguf, controllers)
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(rounds + 1):
            for name, command in commands.items():
                seconds = seconds_to_first_text(command, HEADER.get(name, b""))
                if number:
                    taken[name].append(seconds)
    targets = {OURS: "at most 2", OUR_COMMAND: "at most 3", OURS_ON_LLAMA: "at most 0.6"}
    for name, seconds_each in taken.items():
        say(name, statistics.median(seconds_each), "s", targets.get(name, ""))
    for name in commands.keys() - targets.keys():
        say(f"{name} takes longer than ours by", ratio(taken[name], taken[OURS]), "x")
    for name, command in commands.items():
        say(f"{name}: resident", largest_resident(command), "MB")


if __name__ == "__main__":
    main()
