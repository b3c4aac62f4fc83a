"""Run the application until somebody stops it: SIGTERM or Ctrl-C, and it finishes what is under way."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from mlx_lqr.errors import InputError

GRACE = 20.0
"""Seconds in which answers under way may come to their ends"""
HURRIED = 5.0
"""Seconds after that in which their clients are told that the server stops"""


def bound(host: str, port: int) -> socket.socket:
    """A socket for a host and port, on which nothing listens yet; port 0 takes a free one.

    Raises:
        InputError: there is no such host here, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        if os.name != "nt":  # where it would let two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        return listening
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen on {host}, port {port} ({reason}): choose another --host or --port") from None


def listen(
    app: ASGIApp,
    listening: socket.socket,
    *,
    ready: Callable[[], None],
    hurry: Callable[[], None],
    grace: float = GRACE,
) -> None:
    """Serve until SIGTERM or SIGINT; then accept no more, and wait for the answers under way.

    Args:
        listening: see `bound`.
        ready: called when clients can connect.
        hurry: ends what is still under way after the grace time.
        grace: seconds to wait. A second Ctrl-C ends the wait.
    """
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=math.ceil(grace + HURRIED),
        ws="none",
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    asyncio.run(_Server(config, ready, hurry, grace).serve([listening]))


class _Server(uvicorn.Server):
    """A signal ends it as if it had been asked to end: the process goes on, and exits with status 0."""

    def __init__(
        self, config: uvicorn.Config, ready: Callable[[], None], hurry: Callable[[], None], grace: float
    ) -> None:
        super().__init__(config)
        self._ready, self._hurry, self._grace = ready, hurry, grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        hurrying = asyncio.get_running_loop().call_later(self._grace, self._hurry)
        await super().shutdown(sockets)
        hurrying.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
