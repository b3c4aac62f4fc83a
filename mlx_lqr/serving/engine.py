"""The engine answers many requests side by side, and tells of every token as it comes.

One thread does all the work, turn by turn: a part of a prompt is read, or several short ones in one pass, then every
answer gets a token. A request joins the batch when its prompt has been read, and leaves it with its last token.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from mlx_lqr.backends.overflow import first_overflow
from mlx_lqr.backends.protocol import Decoder, Runner, TracingDecoder
from mlx_lqr.errors import InputError, first_line
from mlx_lqr.launched import count
from mlx_lqr.runtime.generate import Strength
from mlx_lqr.serving.answer import Answer
from mlx_lqr.serving.batch import Batch
from mlx_lqr.serving.prefixes import Prefixes
from mlx_lqr.serving.requests import Event, Full, OnEvent, Request, Stats, Tracking

__all__ = ["Engine", "Event", "Full", "Request", "Stats", "Ticket", "Tracking"]

PREFILL = 256
"""Prompt tokens that are read before the answers under way get another token"""
TOKENS = 32_768
"""Of all answers under way"""
KEPT = 16
"""Requests that have ended whose states are kept"""


@dataclass(eq=False)
class Ticket:
    """A request that was submitted. Its methods may be called from any thread."""

    _answer: Answer
    _cancelled: bool = False

    def cancel(self) -> None:
        """End the answer, at the latest after its next token; one that has ended stays as it is."""
        self._cancelled = True

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not run, since an earlier request's states were reused; once it is read."""
        return self._answer.cached

    def steer(self, strength: Strength) -> None:
        """Steer at another strength from the next token on.

        Args:
            strength: one number for all concepts, or one for each; None for the recommended one.

        Raises:
            InputError: it is no such number, nothing steers this answer, or it has ended.
        """
        if self._answer.ended:
            raise InputError("this answer has ended: its strength can no longer change")
        self._answer.strength = self._answer.checked(strength)


class Engine:
    """Answers requests in the order in which they come, as many side by side as there are slots.

    Each gets the tokens that it would get alone. All methods may be called from any thread.

    Args:
        model: what `load` returned.
        slots: how many answers may be under way at once.
        waiting: how many requests may wait for a slot.
        tokens: how many tokens the answers under way may come to together, prompts included and all of them as long as
            the longest, since they are padded to it; others wait.
        kept: how many tokens' states of requests that have ended are kept, for requests that begin alike.

    Raises:
        InputError: numbers that cannot be, or several processes.
    """

    def __init__(
        self, model: Runner, *, slots: int = 8, waiting: int = 64, tokens: int = TOKENS, kept: int = TOKENS // 2
    ) -> None:
        if min(slots, waiting, tokens) < 1 or kept < 0:
            raise InputError("slots, waiting and tokens must be at least 1, and kept at least 0")
        if count() > 1:
            raise InputError("serving runs in one process: start it without mlx.launch")
        self._model, self._slots, self._limit, self._room = model, slots, waiting, tokens
        self._shares_passes = model.decoder().shares_passes
        self._batch = Batch(model, self._keep_states)
        self._prefixes = Prefixes(KEPT if kept else 0, kept)
        self._reading: tuple[Sequence[Answer], Iterator[int]] | None = None
        """Whose prompts are being read, and what reads them: it yields the tokens of each part"""
        self._changed = threading.Condition()
        """Guards all that follows, which several threads change"""
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._closing = False
        self._ended = {"finished": 0, "cancelled": 0, "failed": 0}
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self._thread = threading.Thread(target=self._work, name="mlx-lqr engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Answer a request as soon as there is a slot.

        Args:
            on_event: called on the engine's thread with each token; it must return at once.

        Raises:
            InputError: the request cannot be answered (see `Answer`), or the engine is closed.
            Full: too many requests are waiting.
        """
        answer = Answer(self._model, request, on_event)
        if answer.room > self._room:
            raise InputError(
                f"{len(answer.prompt)} prompt tokens and {request.max_tokens} new ones are more than the {self._room} "
                "that there is memory for: shorten the prompt, or ask for fewer (max_tokens)"
            )
        ticket = Ticket(answer)
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
            return Stats(
                running=len(self._running),
                waiting=len(self._waiting),
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens + sum(ticket._answer.count for ticket in self._running),
                cached_tokens=self._cached_tokens,
                side_by_side=self._shares_passes,
                **self._ended,
            )

    def _work(self) -> None:
        """What the thread does."""
        while self._has_work():
            self._end_cancelled()
            self._read()
            self._in_batch(self._batch.step)
            self._count_ended()
        self._prefixes.clear()
        self._model.leave_thread()

    def _in_batch(self, do: Callable[[], None]) -> None:
        """Do something that, where it fails, fails for all answers of the batch."""
        try:
            do()
        except Exception as error:  # not enough memory, say
            self._batch.fail(error)

    def _has_work(self) -> bool:
        """Wait until there is something to do; False when there will be nothing more."""
        with self._changed:
            while not self._waiting and not self._running:
                if self._closing:
                    return False
                self._changed.wait()
            return True

    def _end_cancelled(self) -> None:
        with self._changed:
            gone = [ticket for ticket in self._waiting if ticket._cancelled]
            for ticket in gone:
                self._waiting.remove(ticket)
            self._running += gone  # to be counted with the others
            gone = [ticket for ticket in self._running if ticket._cancelled]
        for ticket in gone:
            ticket._answer.end("cancelled")

    def _count_ended(self) -> None:
        names = {"stop": "finished", "length": "finished", "cancelled": "cancelled", "error": "failed"}
        with self._changed:
            for ticket in self._running:
                if (finish := ticket._answer.finish) is not None:
                    self._ended[names[finish]] += 1
                    self._generated_tokens += ticket._answer.count
            self._running = [ticket for ticket in self._running if not ticket._answer.ended]

    def _read(self) -> None:
        """Read prompts, one after another, until `PREFILL` tokens have been read or there is no slot."""
        spent = 0
        while spent < PREFILL:
            if self._reading is None and (taken := self._next()):
                self._reading = taken, self._parts(taken)
            if self._reading is None:
                return
            self._in_batch(self._batch.tell)
            answers, parts = self._reading
            try:
                spent += next(parts, PREFILL) if not all(answer.ended for answer in answers) else 0
            except Exception as error:  # of these requests alone
                for answer in answers:
                    answer.end("error", first_line(error))
            if all(answer.ended or answer in self._batch.answers for answer in answers):
                self._reading = None

    def _next(self) -> list[Answer]:
        """The requests that have waited longest: one, or some whose prompts are read in one pass; as far as there are
        slots and there is room."""
        taken: list[Answer] = []
        with self._changed:
            while self._waiting and len(self._running) < self._slots:
                answer = self._waiting[0]._answer
                rooms = [ticket._answer.room for ticket in [*self._running, self._waiting[0]]]
                if (max(rooms) * len(rooms) if self._shares_passes else sum(rooms)) > self._room:
                    break
                group = [*taken, answer]
                width = max(len(one.prompt) for one in group)
                if taken and not (len(group) * width <= PREFILL and all(map(self._reads_with_others, group))):
                    break
                taken = group
                self._running.append(self._waiting.popleft())
                self._prompt_tokens += len(answer.prompt)
        return taken

    def _reads_with_others(self, answer: Answer) -> bool:
        """Whether its prompt is merely read, from the first token on."""
        *before, _ = answer.prompt
        special = answer.request.scores is not None or answer.steers_all or answer.penalises
        return bool(before) and not special and not self._prefixes.begins(before)

    def _parts(self, answers: Sequence[Answer]) -> Iterator[int]:
        """Read prompts part by part, and let the answers join the batch; yields how many tokens each part has."""
        if len(answers) > 1:
            together = self._model.decoder()
            together.fill([answer.prompt[:-1] for answer in answers], steered=False)
            for row, answer in enumerate(answers):
                self._begin(answer, together.apart(row))
            yield sum(len(answer.prompt) for answer in answers)
            return
        (answer,) = answers
        if answer.request.scores is not None:
            yield from answer.scored(PREFILL)
        if answer.ended:  # where only scores were asked for
            return
        *before, _ = answer.prompt
        decoder, held = self._begun(answer, before)
        answer.cached = held
        if answer.steers_all or answer.penalises:  # from the first token on
            decoder.law, decoder.sampling = answer.law, answer.request.sampling
        size = PREFILL if decoder.fills_in_parts else max(1, len(before))
        for start in range(held, max(len(before), held + 1), size):
            part = before[start : start + size]
            decoder.fill([part], steered=answer.steers_all)
            yield len(part)
        self._begin(answer, decoder)
        yield 1

    def _begin(self, answer: Answer, decoder: Decoder) -> None:
        """Let an answer join the batch, whose prompt has been read but for the last token."""
        *_, last = answer.prompt
        try:
            if answer.adaptive:
                trace = cast(TracingDecoder, decoder).trace(last)
                if first_overflow(trace.residual) is not None:
                    raise self._model.decoder().overflow(answer.prompt, len(answer.prompt) - 1)
                answer.adapt(trace)
            decoder.law, decoder.sampling = answer.law, answer.request.sampling
            answer.taken()  # of a prompt that is steered as a whole
            self._batch.begin(answer, decoder)
        except Exception as error:  # of this request alone
            answer.end("error", first_line(error))

    def _begun(self, answer: Answer, tokens: list[int]) -> tuple[Decoder, int]:
        """A decoder that may hold the first of the tokens already, and how many."""
        begun = None if answer.steers_all or answer.penalises else self._prefixes.longest(tokens)
        if begun is None:
            return self._model.decoder(), 0
        with self._changed:
            self._cached_tokens += begun[1]
        return begun

    def _keep_states(self, answer: Answer, decoder: Decoder, row: int) -> None:
        """Keep the states of an answer that ends, as far as others may use them."""
        if answer.finish == "error":
            return
        try:
            self._prefixes.add(answer.unsteered, decoder, row)
        except Exception:  # there is no memory for a copy, say: the next request reads its prompt anew
            self._prefixes.clear()
