"""Hundreds of mixed requests over HTTP, many at a time: nothing leaks, no token is wrong, nothing hangs.

    python benchmarks/soak.py demo --requests 500
    python benchmarks/soak.py demo --requests 500 --backend torch

Some requests are cancelled in the middle of their stream, some are malformed, some are steered otherwise on their way.
Every greedy answer has to be the one that the library gives alone. What is left at the end is compared with what was
there before: places in the engine, threads, open files; and memory with what it was after a fifth of the requests.
The exit status is 1 where anything is wrong.
"""

from __future__ import annotations

import gc
import http.client
import json
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil

import mlx_lqr  # first, so that MLX gets its BLAS

AT_ONCE = 16
PATIENCE = 120.0
"""Seconds for one request; one that takes longer hangs"""
GROWTH = 100.0
"""MB by which memory may grow after the first fifth: kept states, which are bounded, and what allocators hold on to"""
LAYERS = [28, 29]
PROMPTS = (
    "Once upon a time, in a small town by a river, there lived a",
    "The best way to spend a day off is",
    "My neighbour has a dog that",
    "In the middle of the night the captain saw a light, and",
    "Water",
)
MALFORMED: tuple[tuple[dict[str, Any] | bytes, int], ...] = (
    (b"{", 400),
    (b"[1, 2]", 400),
    ({"model": "no such model"}, 404),
    ({"temperature": "hot"}, 400),
    ({"max_tokens": 10**9}, 400),
    ({"steering": {"no such concept": 1}}, 400),
    ({"prompt": [-1]}, 400),
    ({"tools": [{"type": "function"}]}, 400),
)
"""What a body becomes, or what is changed in it, and the status that it has to get"""


@dataclass(frozen=True)
class Kind:
    """A request that is asked again and again, and the text that has to follow; None where tokens are drawn."""

    body: dict[str, Any]
    text: str | None


@dataclass
class Outcome:
    """What has happened, and what was wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    grown: float = 0.0
    """MB after the first fifth"""


def kinds_of(model: Any, controllers: Mapping[str, mlx_lqr.Controller], prompts: Sequence[list[int]]) -> list[Kind]:
    """Every prompt with every steering, greedy and drawn, and what the library gives alone."""
    chance = random.Random(0)
    first, second = controllers
    steerings: list[dict[str, float]] = [{}, {first: 2.0}, {second: -1.0}, {first: 1.5, second: 1.0}]
    kinds = []
    for number, prompt in enumerate(prompts):
        for steering in steerings:
            count = chance.choice([1, 5, 12, 24])
            body = {"model": model.name, "prompt": prompt, "steering": steering, "max_tokens": count}
            if number % 3 == 2:
                kinds.append(Kind({**body, "temperature": 0.9, "top_p": 0.9, "seed": number}, None))
                continue
            options: dict[str, Any] = {}
            if steering:
                combined = mlx_lqr.Controller.combine(*(controllers[name] for name in steering))
                options = {"controller": combined, "strength": [steering[name] for name in combined.concepts]}
            text = mlx_lqr.generate(model, prompt, temperature=0, max_tokens=count, **options)
            kinds.append(Kind({**body, "temperature": 0}, text))
    return kinds


def soak(
    model: Any,
    controllers: Mapping[str, mlx_lqr.Controller],
    prompts: Sequence[list[int]],
    requests: int,
    *,
    at_once: int = AT_ONCE,
    growth: float = GROWTH,
) -> Outcome:
    """Serve a model, ask it, and look at what is left.

    Args:
        controllers: two, by their concepts.
        prompts: token ids.
        growth: MB by which memory may grow after the first fifth of the requests.
    """
    kinds, outcome = kinds_of(model, controllers, prompts), Outcome()
    process, threads = psutil.Process(), {*threading.enumerate()}
    files = process.num_fds()
    with tempfile.TemporaryDirectory() as folder, served(model, controllers, Path(folder)) as port:
        begun = time.perf_counter()
        for first, count in ((0, requests // 5), (requests // 5, requests - requests // 5)):
            before = _resident(process)
            with ThreadPoolExecutor(at_once) as pool:
                for ending, complaint in pool.map(
                    lambda number: _one(port, number, kinds), range(first, first + count)
                ):
                    outcome.counts[ending] += 1
                    outcome.wrong += [complaint] if complaint is not None else []
        outcome.seconds, outcome.grown = time.perf_counter() - begun, _resident(process) - before
        _check_empty(port, outcome)
    gc.collect()
    left = [thread.name for thread in threading.enumerate() if thread not in threads]
    if left:
        outcome.wrong.append(f"threads are left: {', '.join(left)}")
    if (opened := process.num_fds() - files) > 0:
        outcome.wrong.append(f"{opened} files are left open")
    if outcome.grown > growth:
        outcome.wrong.append(f"memory grew by {outcome.grown:.0f} MB, of which {growth:.0f} are allowed")
    if sum(outcome.counts.values()) != requests:
        outcome.wrong.append(f"{sum(outcome.counts.values())} of {requests} requests came to an end")
    return outcome


@contextmanager
def served(model: Any, controllers: Mapping[str, mlx_lqr.Controller], folder: Path) -> Iterator[int]:
    """The port on which the model is served, in threads of this process."""
    import uvicorn

    from mlx_lqr.serving.app import application
    from mlx_lqr.serving.guard import Access
    from mlx_lqr.serving.service import Service

    service = Service(model, folder)
    for concept, controller in controllers.items():
        service.controllers.add(concept, controller)
    config = uvicorn.Config(application(service, Access()), port=0, log_config=None, access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        service.close()


def _one(port: int, number: int, kinds: Sequence[Kind]) -> tuple[str, str | None]:
    """One request, of a kind and with an ending that its number decides: the ending, and what was wrong."""
    chance = random.Random(number)
    kind = chance.choice(kinds)
    (ending,) = chance.choices([*ENDINGS], [share for share, _ in ENDINGS.values()])
    try:
        complaint = ENDINGS[ending][1](port, kind, chance)
    except TimeoutError:
        complaint = f"no answer after {PATIENCE:.0f} seconds"
    except Exception as error:  # of a client that is answered otherwise than it expects
        complaint = f"{type(error).__name__}: {error}"
    return ending, None if complaint is None else f"request {number} ({ending}): {complaint}"


def _whole(port: int, kind: Kind, chance: random.Random) -> str | None:
    status, content = _asked(port, kind.body)
    return _compared(kind, status, content)


def _echoed(port: int, kind: Kind, chance: random.Random) -> str | None:
    """With the prompt scored, and the answer after it."""
    status, content = _asked(port, {**kind.body, "echo": True, "logprobs": 1})
    if status != 200:
        return f"status {status}"
    scored = json.loads(content)["choices"][0]["logprobs"]["token_logprobs"]
    if scored[0] is not None or len(scored) < len(kind.body["prompt"]):
        return f"{len(scored)} scores for {len(kind.body['prompt'])} tokens"
    return None


def _streamed(port: int, kind: Kind, chance: random.Random) -> str | None:
    status, content = _asked(port, {**kind.body, "stream": True})
    lines = [line for line in content.decode().splitlines() if line.startswith("data: ")]
    if status != 200 or lines[-1] != "data: [DONE]":
        return f"status {status}, and the end {lines[-1:]}"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    text = "".join(event["choices"][0]["text"] for event in events)
    return f"{text!r} in place of {kind.text!r}" if kind.text not in (None, text) else None


def _cancelled(port: int, kind: Kind, chance: random.Random) -> str | None:
    """Gone before the answer, or after a few of its chunks."""
    connection = _begun(port, {**kind.body, "max_tokens": 100, "stream": True})
    try:
        if chance.random() < 0.7:
            response = connection.getresponse()
            for _ in range(chance.randint(1, 6)):
                response.readline()
        connection.sock.shutdown(socket.SHUT_RDWR)
    finally:
        connection.close()
    return None


def _resteered(port: int, kind: Kind, chance: random.Random) -> str | None:
    """At another strength from some token on."""
    connection = _begun(port, {**kind.body, "max_tokens": 24, "stream": True})
    try:
        response = connection.getresponse()
        if response.status != 200:
            return f"status {response.status}"
        first = next(line for line in response if line.startswith(b"data: "))  # after notes that it waits
        name = json.loads(first.removeprefix(b"data: "))["id"]
        steering = dict.fromkeys(kind.body["steering"], 0.5)
        status, _ = _asked(port, {"steering": steering}, f"/v1/steering/{name}")
        response.read()
    finally:
        connection.close()
    return None if status in (200, 404) else f"status {status}"  # 404: it had ended


def _malformed(port: int, kind: Kind, chance: random.Random) -> str | None:
    change, expected = chance.choice(MALFORMED)
    status, content = _asked(port, change if isinstance(change, bytes) else {**kind.body, **change})
    message = json.loads(content).get("error", {}).get("message", "")
    ok = status == expected and message and len(message.splitlines()) == 1
    return None if ok else f"status {status} in place of {expected}: {message!r}"


ENDINGS = {
    "whole": (3, _whole),
    "streamed": (3, _streamed),
    "echoed": (1, _echoed),
    "cancelled": (1, _cancelled),
    "steered otherwise": (1, _resteered),
    "malformed": (1, _malformed),
}
"""How a request may go on, and how often it does"""


def _compared(kind: Kind, status: int, content: bytes) -> str | None:
    if status != 200:
        return f"status {status}: {content[:200]!r}"
    text = json.loads(content)["choices"][0]["text"]
    return f"{text!r} in place of {kind.text!r}" if kind.text not in (None, text) else None


def _asked(port: int, body: dict[str, Any] | bytes, path: str = "/v1/completions") -> tuple[int, bytes]:
    connection = _begun(port, body, path)
    try:
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _begun(port: int, body: dict[str, Any] | bytes, path: str = "/v1/completions") -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, content, {"Content-Type": "application/json"})
    return connection


def _check_empty(port: int, outcome: Outcome) -> None:
    """All places have to be free again, and soon."""
    deadline = time.monotonic() + PATIENCE
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        told = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        numbers = {name: float(value) for name, _, value in told if value}
        busy = numbers["mlx_lqr_answers_running"] + numbers["mlx_lqr_answers_waiting"]
        if not busy:
            break
        if time.monotonic() > deadline:
            outcome.wrong.append(f"{busy:.0f} answers still have a place")
            break
        time.sleep(0.05)
    outcome.tokens = round(numbers["mlx_lqr_generated_tokens_total"])
    if failed := numbers["mlx_lqr_answers_failed_total"]:
        outcome.wrong.append(f"{failed:.0f} answers failed")


def _resident(process: psutil.Process) -> float:
    """MB"""
    gc.collect()
    return process.memory_info().rss / 1e6


def _fitted(model: Any, concept: str) -> mlx_lqr.Controller:
    positive, negative = mlx_lqr.bundled_prompts(concept)
    return mlx_lqr.fit(
        model, positive[:20], negative[:20], concept=concept, layers=LAYERS, cost="feature", jacobian_prompts=1
    )


@click.command()
@click.argument("model")
@click.option("--backend", type=click.Choice(["mlx", "torch"]), default="mlx")
@click.option("--requests", type=click.IntRange(min=5), default=500)
@click.option("--at-once", type=click.IntRange(min=1), default=AT_ONCE)
def main(model: str, backend: str, requests: int, at_once: int) -> None:
    loaded: Any = mlx_lqr.load(model, backend=backend)  # type: ignore[arg-type]
    controllers = {concept: _fitted(loaded, concept) for concept in ("dog", "ocean")}
    prompts = [loaded.tokenizer.encode(prompt) for prompt in PROMPTS]
    outcome = soak(loaded, controllers, prompts, requests, at_once=at_once)
    for name, count in outcome.counts.items():
        click.echo(f"{name:20}{count:6}")
    click.echo(f"{outcome.tokens} tokens told in {outcome.seconds:.0f} s; memory grew by {outcome.grown:.0f} MB")
    for line in outcome.wrong[:20]:
        click.echo(f"wrong: {line}", err=True)
    if outcome.wrong:
        raise click.ClickException(f"{len(outcome.wrong)} things were wrong")
    click.echo("Nothing leaked, no token was wrong, nothing hung.")


if __name__ == "__main__":
    main()
