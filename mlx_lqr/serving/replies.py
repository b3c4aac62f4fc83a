"""Replies as they are written: the engine's events of one request, and what becomes of them in OpenAI's form."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mlx_lqr.backends.protocol import Scored
from mlx_lqr.backends.text.text_tokenizer import TextTokenizer
from mlx_lqr.errors import InputError
from mlx_lqr.serving.engine import Engine, Event, Full, Request, Ticket, Tracking
from mlx_lqr.serving.failures import RequestError, unusable

RETRY_AFTER = 2
"""Seconds after which a client may try again where too many wait"""


class Reply:
    """What follows one request: one ticket of the engine for each of its choices. For the event loop's thread.

    Raises:
        RequestError: a request that the engine refuses, or too many that wait.
    """

    def __init__(self, engine: Engine, name: str, requests: Sequence[Request], strengths: dict[str, float]) -> None:
        self.id = name
        self.created = int(time.time())
        self.requests = requests
        self.strengths = strengths
        """Of each concept that may be steered, in the steering's order"""
        self._first = {id(one.prompt): i for i, one in reversed([*enumerate(requests)])}
        """The first choice of each prompt, which several may follow"""
        self.prompt_tokens = sum(len(requests[i].prompt) for i in self._first.values())
        self.tokens = 0
        """Generated so far"""
        self.first_token: float | None = None
        """Seconds from the request to it"""
        self._begun = self._latest = time.monotonic()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._running = len(requests)
        self._tickets: list[Ticket] = []
        loop = asyncio.get_running_loop()

        def hand_over(index: int, event: Event) -> None:  # on the engine's thread
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        try:
            for index, request in enumerate(requests):
                self._tickets.append(engine.submit(request, partial(hand_over, index)))
        except InputError as error:
            self.cancel()
            raise unusable(error) from None
        except Full:
            self.cancel()
            raise RequestError(
                503, "too many requests wait: try again in a moment", headers={"Retry-After": str(RETRY_AFTER)}
            ) from None

    @property
    def ended(self) -> bool:
        return self._running == 0

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that were not run again, a prompt counted once."""
        return sum(self._tickets[i].cached_tokens for i in self._first.values())

    @property
    def rate(self) -> float | None:
        """Tokens a second, of all choices together, after the first token; None before there are two."""
        if self.first_token is None or self.tokens < 2:
            return None
        seconds = self._latest - self._begun - self.first_token
        return (self.tokens - 1) / seconds if seconds > 0 else None

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(choice, event) as they come.

        Raises:
            RequestError: a choice ended with an error, or because the server stops.
        """
        while self._running:
            index, event = await self._queue.get()
            if event.token is not None:
                self.tokens += 1
                self._latest = time.monotonic()
                if self.first_token is None:
                    self.first_token = self._latest - self._begun
            self._running -= event.finish is not None
            if event.finish == "error":
                raise RequestError(400, event.error or "the answer failed", code="generation_failed")
            if event.finish == "cancelled":
                raise RequestError(503, "the server is stopping", headers={"Retry-After": str(RETRY_AFTER)})
            yield index, event

    def steer(self, strengths: dict[str, float]) -> None:
        """Set the strength of some of its concepts, from the next token on.

        Raises:
            RequestError: it has ended.
        """
        wanted, refused = {**self.strengths, **strengths}, []
        for ticket in self._tickets:
            try:
                ticket.steer(list(wanted.values()))
            except InputError as error:  # this choice has ended
                refused.append(error)
        if len(refused) == len(self._tickets):
            raise RequestError(404, str(refused[0]), code="not_found")
        self.strengths = wanted

    def cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()


@dataclass
class _Choice:
    """One choice of an answer that is sent as a whole."""

    text: str = ""
    events: list[Event] = field(default_factory=list)
    finish: str | None = None


class Form(ABC):
    """How one kind of completion is written.

    Args:
        reply: what is written.
        model: the name that the client asked for.
        tokenizer: for the texts of single tokens.
        with_usage: whether streamed chunks end with the counts of tokens.
        tracked: whether each token goes with what the controllers measured and did.
    """

    object: str
    chunk: str

    def __init__(
        self, reply: Reply, model: str, tokenizer: TextTokenizer, *, with_usage: bool = False, tracked: bool = False
    ) -> None:
        self._reply, self._model, self._tokenizer = reply, model, tokenizer
        self._with_usage, self._tracked = with_usage, tracked

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        choices = [_Choice() for _ in self._reply.requests]
        async for index, event in self._reply.events():
            choice = choices[index]
            choice.text += event.text
            choice.events.append(event)
            choice.finish = event.finish
        written = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._head(self.object), "choices": written, "usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer as objects, one for each event."""
        for opening in self._openings():
            yield self._chunk([opening])
        async for index, event in self._reply.events():
            choice = {"index": index, **self._delta(index, event), "finish_reason": event.finish}
            yield self._chunk([choice], event.tracking)
        if self._with_usage:
            yield {**self._head(self.chunk), "choices": [], "usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]], tracking: Tracking | None = None) -> dict[str, Any]:
        chunk = {**self._head(self.chunk), "choices": choices}
        if self._with_usage:
            chunk["usage"] = None
        if tracking is not None and self._tracked:
            chunk["tracking"] = self._tracking(tracking)
        return chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._reply.id, "object": kind, "created": self._reply.created, "model": self._model}

    def _usage(self) -> dict[str, Any]:
        prompt, generated = self._reply.prompt_tokens, self._reply.tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": self._reply.cached_tokens},
        }

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        written = {"index": index, **self._content(index, choice), "finish_reason": choice.finish}
        if self._tracked:
            tracked = [event.tracking for event in choice.events if event.tracking is not None]
            written["tracking"] = [self._tracking(one) for one in tracked]
        return written

    def _tracking(self, tracking: Tracking) -> dict[str, Any]:
        entry: dict[str, Any] = {"layers": list(tracking.layers), "concepts": list(tracking.concepts)}
        for name in ("error", "feature", "setpoint", "push"):
            entry[name] = _without_nan(getattr(tracking, name).tolist())
        return entry

    def _token_text(self, token: int) -> str:
        """A token's own text, as it is between others: by itself, some tokenizers leave out its space."""
        before = self._tokenizer.encode("a", add_special_tokens=False)
        own = self._tokenizer.decode([*before, token], skip_special_tokens=False)
        return own[len(self._tokenizer.decode(before, skip_special_tokens=False)) :]

    @abstractmethod
    def _openings(self) -> list[dict[str, Any]]:
        """What is streamed before the first token."""

    @abstractmethod
    def _delta(self, index: int, event: Event) -> dict[str, Any]:
        """One event of a streamed choice."""

    @abstractmethod
    def _content(self, index: int, choice: _Choice) -> dict[str, Any]:
        """A whole choice."""


class ChatForm(Form):
    object, chunk = "chat.completion", "chat.completion.chunk"

    def _openings(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        indices = range(len(self._reply.requests))
        return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in indices]

    def _delta(self, index: int, event: Event) -> dict[str, Any]:
        logprobs = self._logprobs([event])
        return {"delta": {"content": event.text} if event.text or logprobs else {}, "logprobs": logprobs}

    def _content(self, index: int, choice: _Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(choice.events)}

    def _logprobs(self, events: Sequence[Event]) -> dict[str, Any] | None:
        known = [(event, event.token, event.logprob) for event in events if event.token is not None]
        if not known or all(logprob is None for _, _, logprob in known):
            return None
        content = []
        for event, token, logprob in known:
            likeliest = [self._entry(other, number) for other, number in event.top]
            content.append({**self._entry(token, logprob), "top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._token_text(token)
        return {"token": text, "logprob": _number(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}


class CompletionForm(Form):
    """
    Args:
        reply, model, tokenizer, **options: see `Form`.
        echoed: the text of each choice's prompt, where it stands before the answer.
    """

    object, chunk = "text_completion", "text_completion"

    def __init__(
        self, reply: Reply, model: str, tokenizer: TextTokenizer, *, echoed: Sequence[str] = (), **options: bool
    ) -> None:
        super().__init__(reply, model, tokenizer, **options)
        self._echoed = [*echoed] or [""] * len(reply.requests)
        self._lengths = [0] * len(reply.requests)
        """Characters of each choice so far"""

    def _openings(self) -> list[dict[str, Any]]:
        """A prompt whose scores follow goes with them."""
        alone = [i for i, text in enumerate(self._echoed) if text and self._reply.requests[i].scores is None]
        return [{"index": i, "text": self._echoed[i], "logprobs": None, "finish_reason": None} for i in alone]

    def _delta(self, index: int, event: Event) -> dict[str, Any]:
        text = event.text if event.scores is None else self._echoed[index] + event.text
        return {"text": text, "logprobs": self._logprobs(index, [event])}

    def _content(self, index: int, choice: _Choice) -> dict[str, Any]:
        return {"text": self._echoed[index] + choice.text, "logprobs": self._logprobs(index, choice.events)}

    def _logprobs(self, index: int, events: Sequence[Event]) -> dict[str, Any] | None:
        scored: list[tuple[int, Scored | None]] = []
        for event in events:
            if event.scores is not None:
                scored += zip(self._reply.requests[index].prompt, event.scores, strict=True)
            if event.token is not None and event.logprob is not None:
                scored.append((event.token, (event.logprob, event.top)))
        if not scored:
            return None
        texts = [self._token_text(token) for token, _ in scored]
        offsets = []
        for text in texts:
            offsets.append(self._lengths[index])
            self._lengths[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if one is None else _number(one[0]) for _, one in scored],
            "top_logprobs": [None if one is None else self._likeliest(one) for _, one in scored],
            "text_offset": offsets,
        }

    def _likeliest(self, scored: Scored) -> dict[str, float | None]:
        """By their texts, the likeliest first; of tokens with one text the likeliest counts."""
        texts: dict[str, float | None] = {}
        for token, logprob in scored[1]:
            texts.setdefault(self._token_text(token), _number(logprob))
        return texts


def new_id(prefix: str) -> str:
    """An id that nobody can guess, since whoever knows it may steer the answer."""
    return f"{prefix}-{secrets.token_hex(16)}"


def _number(value: float | None) -> float | None:
    """As JSON can hold it: log-probabilities of -infinity are OpenAI's -9999."""
    return None if value is None else float(value) if math.isfinite(value) else -9999.0


def _without_nan(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return values if math.isfinite(values) else None
