"""Who may ask, and how: keys, hosts, kinds and sizes of bodies. Around the whole application.

A page from elsewhere, open in a browser on this machine, can send requests to a server on the loopback interface. It
cannot send JSON without asking first, and this server answers no such question unless told to (`--allow-origin`); and
where a name of its own leads here (DNS rebinding), the Host header says so.
"""

from __future__ import annotations

import ipaddress
import json
import secrets
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_lqr.errors import first_line
from mlx_lqr.serving.failures import RequestError, log

OPEN = ("/health", "/", "/page/")
"""Paths that need no key: whether the server is there, and the page, which then asks for one"""
GONE = 499
"""The status that is counted where a client went away before it got one"""
JSON_BYTES = 8 << 20
FILE_BYTES = 64 << 20
"""Of a request's body, at most"""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Args:
        host: the address or name that the server listens on.
        key: which clients have to show; None for anybody who can connect.
    """

    host: str = "127.0.0.1"
    key: str | None = None

    def allows_host(self, header: str | None) -> bool:
        """Whether a request's Host header is a name of this server.

        An address is always fine: only a name can be made to lead here.
        """
        name = _without_port(header or "").lower().rstrip(".")
        if name in ("localhost", self.host.lower()) or _address(name) is not None:
            return True
        everywhere = _address(self.host)
        if everywhere is None or not everywhere.is_unspecified:
            return False
        own = socket.gethostname().lower()
        return name in (own, own.partition(".")[0], f"{own}.local")

    def allows_key(self, header: str | None) -> bool:
        """Whether an Authorization header shows the key; takes the same time however much of it is right."""
        if self.key is None:
            return True
        kind, _, shown = (header or "").partition(" ")
        return kind.lower() == "bearer" and secrets.compare_digest(shown.strip().encode(), self.key.encode())


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a host."""
    address = _address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() and (":" not in name or name.endswith("]")) else host


class Guard:
    """Checks every request before the application sees it, and logs a line for each.

    Whatever fails, a client is told one line and no more.

    Args:
        app: what is guarded.
        access: who may ask.
        counted: called with the endpoint, None where there is none, and the status of each response.
    """

    def __init__(self, app: ASGIApp, access: Access, counted: Callable[[object, int], None]) -> None:
        self._app, self._access, self._counted = app, access, counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, _limited(receive, _limit(scope)), answer)
        except RequestError as failure:
            if not status:
                await failure.response()(scope, receive, answer)
        except Exception as error:
            log.error("%s: %s", type(error).__name__, _where(error))
        finally:
            self._counted(scope.get("endpoint"), status or GONE)
            took = time.monotonic() - started
            log.info("%s %s %s %.2fs", scope["method"], quote(scope["path"]), status or "gone", took)

    def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        if len(headers.getlist("host")) != 1 or not self._access.allows_host(headers.get("host")):
            shown = headers.get("host", "")[:80]
            raise RequestError(421, f"this server is not {shown!r}: use the address that it listens on")
        is_open = path in OPEN or path.startswith(OPEN[-1])
        if not is_open and not self._access.allows_key(headers.get("authorization")):
            raise RequestError(
                401,
                "this server needs an API key: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > _limit(scope):
            raise _too_large(scope)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise RequestError(415, "the body must be JSON: send Content-Type: application/json")


def _limit(scope: Scope) -> int:
    return FILE_BYTES if scope["method"] == "PUT" else JSON_BYTES


def _too_large(scope: Scope) -> RequestError:
    return RequestError(413, f"the body is larger than {_limit(scope) >> 20} MiB")


def _limited(receive: Receive, limit: int) -> Receive:
    """The body, up to so many bytes, however its length is declared."""
    left = limit

    async def limited() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise RequestError(413, f"the body is larger than {limit >> 20} MiB")
        return message

    return limited


def _where(error: Exception) -> str:
    """What went wrong and where, on one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return json.dumps(f"{first_line(error)} ({place.name}, line {place.lineno})", ensure_ascii=True)
