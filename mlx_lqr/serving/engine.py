"""The engine answers requests, on a thread of its own, and tells of every token as it comes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

from mlx_lqr.backends.protocol import OVERFLOWED, Runner, TracingDecoder
from mlx_lqr.errors import InputError, OverflowingError, first_line
from mlx_lqr.launched import count
from mlx_lqr.lqr.strength import Strengths
from mlx_lqr.runtime.generate import Strength
from mlx_lqr.serving.answer import Answer
from mlx_lqr.serving.requests import Event, Full, OnEvent, Request, Stats, Tracking

__all__ = ["Engine", "Event", "Full", "Request", "Stats", "Ticket", "Tracking"]

PREFILL = 256
"""Prompt tokens that are run before anything else is looked after"""


@dataclass(eq=False)
class Ticket:
    """A request that was submitted. Its methods may be called from any thread."""

    _answer: Answer
    _cancelled: bool = False
    _strength: Strengths | None = None
    """To be in force from the next token on"""

    def cancel(self) -> None:
        """End the answer, at the latest after its next token; one that has ended stays as it is."""
        self._cancelled = True

    def steer(self, strength: Strength) -> None:
        """Steer at another strength from the next token on.

        Args:
            strength: one number for all concepts, or one for each; None for the recommended one.

        Raises:
            InputError: it is no such number, nothing steers this answer, or it has ended.
        """
        if self._answer.ended:
            raise InputError("this answer has ended: its strength can no longer change")
        self._strength = self._answer.checked(strength)


class Engine:
    """Answers requests one at a time, in the order in which they come. All methods may be called from any thread.

    Args:
        model: what `load` returned.
        slots: how many answers may be under way at once.
        waiting: how many requests may wait for a slot.
    """

    def __init__(self, model: Runner, *, slots: int = 8, waiting: int = 64) -> None:
        if slots < 1 or waiting < 1:
            raise InputError(f"slots and waiting must be at least 1, not {slots} and {waiting}")
        if count() > 1:
            raise InputError("serving runs in one process: start it without mlx.launch")
        self._model, self._limit = model, waiting
        self._changed = threading.Condition()
        """Guards all that follows, which several threads change."""
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._closing = False
        self._stats = Stats(0, 0, 0, 0, 0, 0, 0, 0, side_by_side=False)
        self._thread = threading.Thread(target=self._run, name="mlx-lqr engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Answer a request as soon as there is a slot.

        Args:
            on_event: called on the engine's thread with each token; it must return at once.

        Raises:
            InputError: the request cannot be answered (see `Answer`), or the engine is closed.
            Full: too many requests are waiting.
        """
        ticket = Ticket(Answer(self._model, request, on_event))
        with self._changed:
            if self._closing:
                raise InputError("the engine is closed: it takes no more requests")
            if len(self._waiting) >= self._limit:
                raise Full(f"{self._limit} requests are waiting: try again later")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def close(self, *, finish: bool = False) -> None:
        """Cancel all answers, or let them come to their ends, and stop the thread."""
        with self._changed:
            self._closing = True
            if not finish:
                for ticket in [*self._waiting, *self._running]:
                    ticket.cancel()
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def stats(self) -> Stats:
        with self._changed:
            return replace(self._stats, waiting=len(self._waiting), running=len(self._running))

    def _run(self) -> None:
        while (ticket := self._next()) is not None:
            answer = ticket._answer
            try:
                for _ in self._steps(ticket):
                    if ticket._cancelled and not answer.ended:
                        answer.end("cancelled")
                    if answer.ended:
                        break
            except Exception as error:  # of this request alone
                answer.end("error", first_line(error))
            with self._changed:
                self._running.remove(ticket)

    def _next(self) -> Ticket | None:
        """The next request; waits for one. None when there will be no more."""
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            if not self._waiting:
                return None
            ticket = self._waiting.popleft()
            self._running.append(ticket)
            return ticket

    def _steps(self, ticket: Ticket) -> Iterator[None]:
        """Work through a request; between two steps it may be ended."""
        yield
        answer, request = ticket._answer, ticket._answer.request
        *before, last = answer.prompt
        decoder = self._model.decoder(answer.law, request.sampling)
        for start in range(0, len(before), PREFILL):
            decoder.fill([before[start : start + PREFILL]], steered=answer.steers_all)
            yield
        if answer.adaptive:
            decoder.law = answer.adapt(cast(TracingDecoder, decoder).trace(last))
        answer.taken()
        token = last
        while not answer.ended:
            if ticket._strength is not None and answer.law is not None:
                answer.law.strength, ticket._strength = ticket._strength, None
            logits = decoder.step([token])
            drawn = decoder.sample(logits)
            (token,) = drawn.tolist()
            if token == OVERFLOWED:
                strength = answer.law.strength if answer.law is not None else ()
                description = self._model.description
                raise OverflowingError.at(None, self._model.num_layers, description.dtype, strength)
            if request.top_logprobs is None:
                answer.add(token, taken=answer.taken())
            else:
                ((logprob, top),) = decoder.log_probabilities(logits, drawn, request.top_logprobs)
                answer.add(token, logprob, top, answer.taken())
            yield
