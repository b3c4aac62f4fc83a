"""What a client is told where a request cannot be served: one line, in the form of OpenAI's errors."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from starlette.responses import JSONResponse

from mlx_lqr.errors import InputError

log = logging.getLogger("mlx_lqr.serving")
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error"}
"""By status; all else is the request's fault below 500 and the server's from there on."""


class RequestError(InputError):
    """A request is not served.

    Args:
        status: of HTTP.
        message: one line that says what to do.
        param: the field of the request that is to blame.
        code: OpenAI's short name for what is wrong.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> dict[str, object]:
        """As JSON."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def unusable(error: InputError, param: str | None = None) -> RequestError:
    """The error for what the library refuses."""
    return error if isinstance(error, RequestError) else RequestError(400, str(error), param=param)
