"""The engine's interface, one request at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from mlx_lqr.backends.protocol import Float32, Runner, Sampling
from mlx_lqr.errors import InputError
from mlx_lqr.methods.steering import Steering
from mlx_lqr.runtime.generate import Options, Strength, stream

Finish = Literal["stop", "length", "cancelled", "error"]


class Full(Exception):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Request:
    prompt: Sequence[int]
    steering: Steering | None = None
    strength: Strength = None
    sampling: Sampling = Sampling()  # noqa: RUF009
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    track: bool = False


@dataclass(frozen=True)
class Tracking:
    layers: tuple[int, ...]
    error: Float32
    push: Float32
    feature: Float32 | None = None
    setpoint: Float32 | None = None


@dataclass(frozen=True)
class Event:
    text: str
    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    tracking: Tracking | None = None
    finish: Finish | None = None
    error: str | None = None


@dataclass(frozen=True)
class Stats:
    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    reused_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


class Ticket:
    def __init__(self, request: Request) -> None:
        self.request = request
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def steer(self, strength: Strength) -> None:
        self.strength = strength


class Engine:
    def __init__(self, model: Runner, *, slots: int = 8, waiting: int = 64) -> None:
        self._model, self._waiting = model, waiting
        self._queue: queue.Queue[tuple[Ticket, Callable[[Event], None]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def stats(self) -> Stats:
        return Stats(waiting=self._queue.qsize())

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Ticket:
        if self._queue.qsize() >= self._waiting:
            raise Full
        ticket = Ticket(request)
        self._queue.put((ticket, on_event))
        return ticket

    def close(self, *, finish: bool = False) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (taken := self._queue.get()) is not None:
            ticket, on_event = taken
            request, count = ticket.request, 0
            options: Options = {**asdict(request.sampling), "stop": request.stop, "max_tokens": request.max_tokens}  # type: ignore[typeddict-item]
            if request.steering is not None:
                options |= {"controller": request.steering, "strength": request.strength}
            try:
                for piece in stream(self._model, request.prompt, **options):
                    count += piece.token is not None
                    on_event(Event(piece.text, piece.token))
                    if ticket.cancelled:
                        break
                finish: Finish = "length" if count >= request.max_tokens else "stop"
                on_event(Event("", finish="cancelled" if ticket.cancelled else finish))
            except InputError as error:
                on_event(Event("", finish="error", error=str(error)))
