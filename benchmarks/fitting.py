"""How long a fit takes, calibration included, and what gates by NumPy save of its reading.

    python benchmarks/fitting.py
    python benchmarks/fitting.py --concept dog --rounds 9

The command is timed as a person sees it, process start and all, on SmolLM2. A round that does not count has read the
files. On machines where MLX computes its gates itself (`mlx_lqr/backends/mlx/gates.py`) the ratio is about 1.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from report import ratio, say

import mlx_lqr
from mlx_lqr.backends.mlx import gates
from mlx_lqr.concepts import bundled_prompts

COMMAND = [sys.executable, "-c", "from mlx_lqr.commands import main; main()", "fit", "demo", "--backend", "mlx"]


def fit_seconds(concept: str, rounds: int) -> list[float]:
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds + 1):
            start = time.perf_counter()
            command = [*COMMAND, "--concept", concept, "-o", str(Path(folder) / "fitted.safetensors"), "--force"]
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
    return seconds[1:]


def reading_seconds(concept: str, rounds: int) -> tuple[list[float], list[float]]:
    """For the set's positive prompts: with gates by NumPy, and with MLX's own, in turn."""
    model = mlx_lqr.load("demo", backend="mlx")
    prompts = [model.tokenizer.encode(prompt) for prompt in bundled_prompts(concept)[0]]
    found: tuple[list[float], list[float]] = ([], [])
    least = gates.LEAST
    for _ in range(rounds + 1):
        for own, seconds in zip((least, sys.maxsize), found, strict=True):
            gates.LEAST = own
            start = time.perf_counter()
            model.residuals(prompts)
            seconds.append(time.perf_counter() - start)
    gates.LEAST = least
    return found[0][1:], found[1][1:]


@click.command()
@click.option("--concept", default="ocean", show_default=True, metavar="NAME", help="A bundled set of prompts.")
@click.option("--rounds", default=5, show_default=True)
def main(concept: str, rounds: int) -> None:
    """Measure `mlx-lqr fit` on SmolLM2-135M-Instruct."""
    quick, own = reading_seconds(concept, rounds)
    say("reading prompts: MLX's own gates over NumPy's", ratio(own, quick), "x")
    say(f"mlx-lqr fit demo --concept {concept}", statistics.median(fit_seconds(concept, rounds)), "s", "at most 12")


if __name__ == "__main__":
    main()
