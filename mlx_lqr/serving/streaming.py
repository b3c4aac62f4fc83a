"""Server-sent events, and noticing that a client has gone away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_lqr.serving.failures import RequestError

T = TypeVar("T")
KEEP_ALIVE = 15.0
"""Seconds of silence after which a comment is sent, for whatever stands between and closes quiet connections"""


class GoneError(Exception):
    """The client has gone away."""


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What some work returns; it is cancelled where the client goes away before. The body has been read.

    Raises:
        GoneError: the client has gone away.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise GoneError
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


class EventStream(Response):
    """Objects as server-sent events, and [DONE] after the last one.

    A `RequestError` on the way is the last event. The iterator is closed when the client goes away.

    Args:
        events: JSON objects.
        after: called at the end, however it came.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[Mapping[str, Any], None],
        *,
        after: Callable[[], None],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._after = events, after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(GoneError, OSError):
                await until_gone(receive, self.send_events(send))
        finally:
            self._after()
            await self._events.aclose()

    async def send_events(self, send: Send) -> None:
        async def write(text: str, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        coming = asyncio.ensure_future(anext(self._events, None))
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=KEEP_ALIVE)
                if not done:
                    await write(": waiting\n\n")
                    continue
                event = coming.result()
                if event is None:
                    break
                await write(as_event(event))
                coming = asyncio.ensure_future(anext(self._events, None))
        except RequestError as failure:
            await write(as_event(failure.body))
        finally:
            coming.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await coming
        await write("data: [DONE]\n\n", more=False)


def as_event(value: Mapping[str, Any]) -> str:
    """A JSON object as one server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
