"""The HTTP server's protocol class, with limits that uvicorn lacks.

It limits size and time of the headers, unread bodies, trailers, pipelined requests, and clients that do not read their
answers. At every moment either an answer is being made or a timer runs.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from containers.gateway.config import GatewaySettings
from containers.gateway.errors import Refusal

if TYPE_CHECKING:
    from starlette.types import Scope
    from uvicorn._types import ASGI3Application

# Requests that a client may pipeline.
_AHEAD = 8
_TRANSPORT = "slipway.transport"
Stage = Literal["idle", "head", "body"]


def abort(scope: Scope) -> None:
    """Close a connection at once and drop unsent data. A normal close would wait until the client has read it."""
    transport = scope.get("extensions", {}).get(_TRANSPORT)
    if transport is not None:
        transport.abort()


def bounded(settings: GatewaySettings) -> type[HttpToolsProtocol]:
    """Return the protocol class with these settings bound, since uvicorn makes the objects."""
    return type("BoundedProtocol", (_Bounded,), {"settings": settings})


class _Bounded(HttpToolsProtocol):
    settings: GatewaySettings
    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None
    _stage: Stage = "idle"
    _head_bytes = 0
    _framing_bytes = 0
    _problem: Refusal | None = None
    # The request being answered; `cycle` is the newest, which may wait for this one.
    _running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection, or refuse it if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self._reject(Refusal(503, "too_many_connections", "too many connections", retry_after=1))
            return
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers and drop pipelined requests. uvicorn notifies only the newest request of the disconnect."""
        self._untime_head()
        self.resume_writing()
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of headers, and of chunk extensions and trailers, which could otherwise go on for ever."""
        if self._problem is not None:
            return
        before = self._stage
        if before == "idle" and not self._answering:
            self._time_head()
        self._framing_bytes += len(data)
        super().data_received(data)
        if before == self._stage == "head":
            self._head_bytes += len(data)
        if self._head_bytes > self.settings.max_head_bytes or (
            self._stage == "body" and self._framing_bytes > self.settings.max_head_bytes
        ):
            self._reject(_HEAD_TOO_LARGE)

    def on_message_begin(self) -> None:
        """Give the application access to the connection."""
        self._stage, self._head_bytes = "head", 0
        super().on_message_begin()
        extensions: dict[str, Any] = {_TRANSPORT: self.transport}
        self.scope["extensions"] = extensions

    def on_headers_complete(self) -> None:
        """Refuse headers that are too large before they are used."""
        self._stage, self._framing_bytes = "body", 0
        self._untime_head()
        if len(self.pipeline) >= _AHEAD:
            self._problem = Refusal(
                400, "too_many_requests_ahead", "too many pipelined requests: wait for their answers first", close=True
            )
            raise ValueError("too many pipelined requests")  # as below
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.settings.max_head_bytes:
            self._problem = _HEAD_TOO_LARGE
            raise ValueError("the headers are too large")  # the parser stops, and `send_400_response` is called
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header. Trailers, which arrive here too, are dropped, because they were not checked."""
        if self._stage == "head":
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Reset the framing count: this part of the body has content."""
        self._framing_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request. If it is already answered, the timer for the next one starts."""
        super().on_message_complete()
        self._stage = "idle"
        if not self._answering:
            self._untime_head()
            self._time_head()

    def on_response_complete(self) -> None:
        """Give the client time to read the answer, and to send the rest of a body or of headers that have begun."""
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(self.settings.stall_timeout_s, self.transport.abort)
        elif self._stage != "idle" and not self._answering:
            self._time_head()

    def pause_writing(self) -> None:
        """Drop a client that does not read, but only after the application's own timeout could have noticed."""
        super().pause_writing()
        if self._read_timer is None:
            self._read_timer = self.loop.call_later(2 * self.settings.stall_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads."""
        super().resume_writing()
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def send_400_response(self, msg: str) -> None:
        """Send the error in the same format as all others, unless an answer has begun."""
        problem = self._problem or Refusal(400, "bad_http", msg, close=True)
        self._problem = problem
        self._reject(problem)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection. A client that has not yet read its answer gets some time for it."""
        if self.transport.is_closing():
            return
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self.settings.stall_timeout_s, self.transport.abort)
        super().timeout_keep_alive_handler()

    def _reject(self, problem: Refusal) -> None:
        self._problem = problem
        self._untime_head()
        if self.transport.is_closing():
            return
        if self._answering and self._running is not None and self._running.response_started:
            self.transport.abort()
            return
        body = problem.body()
        head = [b"HTTP/1.1 %d %s" % (problem.status, _REASONS[problem.status]), b"content-type: application/json"]
        head += [b"content-length: %d" % len(body), b"connection: close"]
        head += [b"%s: %s" % pair for pair in problem.headers() if pair[0] != b"connection"]
        self.transport.write(b"\r\n".join([*head, b"", body]))
        self.transport.close()
        self.loop.call_later(self.settings.stall_timeout_s, self.transport.abort)

    @property
    def _answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _time_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.settings.head_timeout_s, self._too_slow)

    def _untime_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if self._stage == "body" or (self._stage == "idle" and self._running is not None):
            self.transport.close()  # a second answer could be mistaken for that of the next request
            return
        self._reject(Refusal(408, "head_too_slow", "the request's headers did not arrive in time", close=True))


_HEAD_TOO_LARGE = Refusal(431, "head_too_large", "the request's headers are too large", close=True)
_REASONS = {
    400: b"Bad Request",
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}
