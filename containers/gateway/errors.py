"""What a client is told, in OpenAI's form, and what is wrong with the gateway's own files."""

from __future__ import annotations

import json
import math
from typing import Any

from containers.errors import ContainerError

CLIENT_CLOSED = 499
"""The status that the log and the metrics give a request whose client hung up; nobody is sent it."""


class ConfigurationError(ContainerError):
    """The gateway's settings, routes or keys can't be used; the message names the file and every wrong key."""


class Refusal(Exception):
    """An answer other than the one that was asked for.

    ``code`` is a stable word for programs; ``retry_after`` seconds, rounded up, go into the header of that name.
    ``close`` ends the connection, since what follows on it was not read.
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

    def document(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.parameter, "code": self.code}}

    def body(self) -> bytes:
        """The document as JSON."""
        return json.dumps(self.document()).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers of such an answer, beside its type and length."""
        found = []
        if self.retry_after is not None:
            found.append((b"retry-after", str(max(1, math.ceil(self.retry_after))).encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        if self.close:
            found.append((b"connection", b"close"))
        return found


_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
