"""Errors: those sent to a client, in OpenAI's format, and those about the gateway's own files."""

from __future__ import annotations

import json
import math

from containers.errors import ContainerError

CLIENT_CLOSED = 499
"""The status in the log and the metrics for a request whose client disconnected. It is never sent."""


class ConfigurationError(ContainerError):
    """The gateway's settings, routes or keys are not valid. The message names the file and each key with a problem."""


class Refusal(Exception):
    """A request is refused; the client gets this as an error in OpenAI's format.

    ``code`` is a stable identifier for programs; ``retry_after`` seconds, rounded up, go into the `Retry-After` header.
    ``close`` closes the connection, because the rest of the request was not read.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        parameter: str | None = None,
        retry_after: float | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.parameter = parameter
        self.retry_after = retry_after
        self.close = close

    def body(self) -> bytes:
        """Return the error as JSON, in OpenAI's format."""
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.parameter, "code": self.code}
        return json.dumps({"error": error}).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the answer's headers, without content type and length."""
        found = []
        if self.retry_after is not None:
            found.append((b"retry-after", str(max(1, math.ceil(self.retry_after))).encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        if self.close:
            found.append((b"connection", b"close"))
        return found


_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
