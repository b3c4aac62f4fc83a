"""A tiny model that is served: its folder, its controllers, the server, and an engine that says what it is told."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from tokenizers import Tokenizer, models, pre_tokenizers

import mlx_lqr
from helpers.backends import tiny_folder
from helpers.controllers import controller_for
from mlx_lqr.backends.protocol import Model
from mlx_lqr.serving import Event, Full, Request, Stats

WORDS = {f"w{token}": token for token in range(64)}
TEMPLATE = "{% for message in messages %}w60 {{ message.content }} {% endfor %}w62"
MESSAGES = [{"role": "user", "content": "w1 w2 w3"}]
PROMPT = "w60 w1 w2 w3 w62"
"""The same in the template"""
CALIBRATION = mlx_lqr.Calibration(
    {"gentle": 0.5, "normal": 1.5, "strong": 3.0}, {"gentle": 0.2, "normal": 0.4, "strong": 0.8}
)


def chat_folder(*, template: bool = True) -> Path:
    """The folder of a tiny model of 64 words, which never ends an answer by itself."""
    folder = tiny_folder("llama", tie_word_embeddings=False)
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    if template:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


def controllers_of(model: Model) -> dict[str, mlx_lqr.Controller]:
    """Two controllers, calibrated by decree."""
    return {
        name: replace(controller_for(model, short), concepts=(name,)).calibrated(CALIBRATION)
        for name, short in (("dog", "a"), ("ocean", "b"))
    }


@dataclass
class ScriptedTicket:
    """A request whose events a test gives."""

    request: Request
    on_event: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    strengths: list[Any] = field(default_factory=list)
    cached_tokens: int = 0

    def cancel(self) -> None:
        self.cancelled.set()
        self.on_event(Event("", finish="cancelled"))

    def steer(self, strength: Any) -> None:
        self.strengths.append(strength)


@dataclass
class ScriptedEngine:
    """Takes requests and answers nothing by itself."""

    full: bool = False
    tickets: list[ScriptedTicket] = field(default_factory=list)

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> ScriptedTicket:
        if self.full:
            raise Full
        self.tickets.append(ScriptedTicket(request, on_event))
        return self.tickets[-1]

    def close(self, *, finish: bool = False) -> None:
        pass

    @property
    def stats(self) -> Stats:
        return Stats(0, 0, 0, 0, 0, 0, 0, 0, side_by_side=True)

    def ticket(self, index: int = 0) -> ScriptedTicket:
        """The ticket of the request that comes; waits for it."""
        soon(lambda: len(self.tickets) > index)
        return self.tickets[index]


def soon(true: Callable[[], bool]) -> None:
    """Wait until this is true."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.005)


@contextmanager
def listening(app: ASGIApp) -> Iterator[int]:
    """The port on which an application is served, in a thread of this process."""
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=1, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    soon(lambda: server.started or not thread.is_alive())
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def events(self) -> list[Any]:
        """The objects of a stream, which has to end as it should."""
        *lines, last = [line for line in self.content.decode().splitlines() if line.startswith("data: ")]
        assert last == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


def ask(
    port: int, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None, whole: bool = True
) -> Any:
    """Send a request as it is: the response, or the connection where its response is not waited for.

    Args:
        body: bytes, or what is sent as JSON.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    kind = {} if body is None or isinstance(body, bytes) else {"Content-Type": "application/json"}
    connection.request(method, path, content, {**kind, **(headers or {})})
    if not whole:
        return connection
    response = connection.getresponse()
    got = Response(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
    connection.close()
    return got
