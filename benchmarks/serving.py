"""How many tokens a second the engine gives to one client and to eight, and what steering costs them, on SmolLM2.

    python benchmarks/serving.py
    python benchmarks/serving.py --tokens 100 --rounds 5 --backend torch

Everything runs in turn, in one process; ratios are medians over rounds. All clients ask at once, and time is from then
to the last token, so that reading the prompts counts too. Each steered one has two concepts, at strengths of its own.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

import click
from report import ratio, say

import mlx_lqr  # first, so that MLX gets its BLAS
from mlx_lqr.backends.protocol import GREEDY
from mlx_lqr.serving import Engine, Event, Request

PROMPT = "Once upon a time, in a small town by a river, there lived a"
CLIENTS = 8
LAYERS = [28, 29]
"""Those that `fit` chooses for these concepts"""


def fitted(model: Any, concept: str) -> mlx_lqr.Controller:
    positive, negative = mlx_lqr.bundled_prompts(concept)
    return mlx_lqr.fit(
        model, positive[:20], negative[:20], concept=concept, layers=LAYERS, cost="feature", jacobian_prompts=1
    )


def pace(engine: Engine, requests: Sequence[Request]) -> float:
    """Tokens a second of all answers together."""
    ended = threading.Semaphore(0)

    def on_event(event: Event) -> None:
        if event.finish is not None:
            ended.release()

    start = time.perf_counter()
    for request in requests:
        engine.submit(request, on_event)
    for _ in requests:
        ended.acquire()
    return sum(request.max_tokens for request in requests) / (time.perf_counter() - start)


@click.command()
@click.option("--backend", type=click.Choice(["mlx", "torch"]), default="mlx")
@click.option("--tokens", default=64, help="New tokens of each answer.")
@click.option("--rounds", default=5)
def main(backend: str, tokens: int, rounds: int) -> None:
    model: Any = mlx_lqr.load("demo", backend=backend)  # type: ignore[arg-type]
    model.tokenizer.end_tokens = frozenset()  # nobody stops early
    both = mlx_lqr.Controller.combine(fitted(model, "dog"), fitted(model, "ocean"))
    prompt = model.tokenizer.encode(PROMPT)
    plain = Request(prompt, sampling=GREEDY, max_tokens=tokens)
    steered = [Request(prompt, both, [2.0 + i / 8, 1.5 - i / 8], GREEDY, tokens) for i in range(CLIENTS)]
    asked = {
        "one client": [plain],
        f"{CLIENTS} clients": [plain] * CLIENTS,
        f"{CLIENTS} steered clients": steered,
    }
    engine = Engine(model, slots=CLIENTS, kept=0)
    paces: dict[str, list[float]] = {name: [] for name in asked}
    for done in range(rounds + 1):
        for name, requests in asked.items():
            measured = pace(engine, requests)
            if done:  # the first round warms up
                paces[name].append(measured)
    engine.close()
    one, several, controlled = paces
    for name, values in paces.items():
        say(name, statistics.median(values), "tokens/s")
    say(f"{several} / {one}", ratio(paces[several], paces[one]), "", "at least 3.5")
    say(f"{controlled} / {several}", ratio(paces[controlled], paces[several]), "", "at least 0.95")


if __name__ == "__main__":
    main()
