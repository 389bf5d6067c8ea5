"""A file over HTTP, from a byte on, read from the socket straight into the caller's buffer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from http.client import HTTPException, HTTPResponse
from urllib.parse import urlsplit

from registry.download import InterruptedStreamError, Reader
from registry.errors import RefusedError, TrackingError
from registry.network import connection as open_connection
from registry.network import watched

_SECONDS = 60.0  # without a byte
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Statuses that another try can change."""
_REFUSED = (400, 401, 403, 404, 412)
"""Statuses that another try does not change; 400 is S3's for credentials that have expired."""


class _Body:
    """What is left of a response."""

    def __init__(self, response: HTTPResponse) -> None:
        self._response = response
        self.pieces = 0

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill the buffer, or some of it; 0 at the end."""
        try:
            count = self._response.readinto(buffer)
            self.pieces += 1
        except (HTTPException, OSError) as error:
            raise InterruptedStreamError(_reason(error)) from error
        if not count and buffer and self._response.length:  # which `HTTPResponse` takes for an end like any other
            raise InterruptedStreamError(f"it ended {self._response.length} bytes too soon")
        return count


@contextmanager
def stream(
    address: str, headers: Mapping[str, str], start: int, authorities: str = "", *, stop: int | None = None
) -> Iterator[tuple[Reader, int]]:
    """Ask for the file at ``address`` from byte ``start`` on, over a connection of its own; follow no redirect.

    With ``stop`` the bytes before it are enough. ``authorities`` is a variable that may name certificates of this
    service's own (`registry.network.tls`).

    Raises:
        InterruptedStreamError: The other side is busy or out of reach.
        RefusedError: It refuses, or there is no such file.
        TrackingError: It answers with something else.
    """
    parts = urlsplit(address)
    connection, path, extra = open_connection(address, _SECONDS, *([authorities] if authorities else []))
    asked = {**headers, **extra, "Accept-Encoding": "identity"}
    if start or stop is not None:
        asked["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    try:
        try:
            connection.connect()
            socket = connection.sock
            with watched(socket):
                connection.request("GET", path, headers=asked)
                response = connection.getresponse()
        except (HTTPException, OSError) as error:
            raise InterruptedStreamError(_reason(error)) from error
        with closing(response):
            begun, body = _start(response, parts._replace(query="").geturl(), start), _Body(response)
            with watched(socket, lambda: body.pieces):
                yield body, begun
    finally:
        connection.close()


def _start(response: HTTPResponse, place: str, start: int) -> int:
    if response.status in BUSY:
        raise InterruptedStreamError(f"{place} answers {response.status}")
    if response.status == 200:
        return 0
    if response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        return start
    kind = RefusedError if response.status in _REFUSED else TrackingError
    raise kind(f"{place} answers {response.status}, not with the file")


def _reason(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
