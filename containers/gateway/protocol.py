"""The HTTP server's connection, with the bounds that uvicorn's lacks.

They are: the head's size and time, the rest of a body that was answered unread, trailers, requests sent ahead of their
answers, and who does not read. At every moment either an answer is being made or a timer runs.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from containers.gateway.config import Settings
from containers.gateway.errors import Refusal

if TYPE_CHECKING:
    from starlette.types import Scope
    from uvicorn._types import ASGI3Application

# Requests that a client may send ahead of their answers.
_AHEAD = 8
_TRANSPORT = "slipway.transport"
Stage = Literal["idle", "head", "body"]


def abort(scope: Scope) -> None:
    """Close a connection at once and drop what was not read; closing it politely would wait for the reader."""
    transport = scope.get("extensions", {}).get(_TRANSPORT)
    if transport is not None:
        transport.abort()


def bounded(settings: Settings) -> type[HttpToolsProtocol]:
    """Return the protocol class with these settings; uvicorn makes its objects itself."""
    return type("BoundedProtocol", (_Bounded,), {"settings": settings})


class _Bounded(HttpToolsProtocol):
    settings: Settings
    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None
    _stage: Stage = "idle"
    _head_bytes = 0
    _framing_bytes = 0
    _problem: Refusal | None = None
    # The request that is worked on; `cycle` is the newest, which may wait for this one's answer.
    _running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or say that there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self._reject(Refusal(503, "too_many_connections", "too many connections", retry_after=1))
            return
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers and what was sent ahead; uvicorn tells the newest request alone that its client left."""
        self._untime_head()
        self.resume_writing()
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what belongs to a head that goes on and on, or to a body's framing: chunks' extensions, trailers."""
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
        """Give the application a way to the connection itself."""
        self._stage, self._head_bytes = "head", 0
        super().on_message_begin()
        extensions: dict[str, Any] = {_TRANSPORT: self.transport}
        self.scope["extensions"] = extensions

    def on_headers_complete(self) -> None:
        """Refuse a head that is too large before anything looks at it."""
        self._stage, self._framing_bytes = "body", 0
        self._untime_head()
        if len(self.pipeline) >= _AHEAD:
            self._problem = Refusal(400, "too_many_requests_ahead", "wait for answers before asking on", close=True)
            raise ValueError("too many requests ahead")  # as below
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.settings.max_head_bytes:
            self._problem = _HEAD_TOO_LARGE
            raise ValueError("the head is too large")  # the parser stops, and `send_400_response` is called
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a head's header. Trailers come this way too: nobody has checked them, nobody reads them."""
        if self._stage == "head":
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """What came with this piece of the body is no framing without end."""
        self._framing_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The next byte begins another head; where this request is answered already, that one has to come in time."""
        super().on_message_complete()
        self._stage = "idle"
        if not self._answering:
            self._untime_head()
            self._time_head()

    def on_response_complete(self) -> None:
        """Give the client time to take the answer, and to send the rest of a body or a head that has begun."""
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(self.settings.stall_timeout_s, self.transport.abort)
        elif self._stage != "idle" and not self._answering:
            self._time_head()

    def pause_writing(self) -> None:
        """Drop a client that does not read: late enough for an application with a time-out of its own to notice."""
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
        """Say what is wrong in the form of all other errors, unless an answer has begun."""
        problem = self._problem or Refusal(400, "bad_http", msg, close=True)
        self._problem = problem
        self._reject(problem)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; one whose reader has not taken its answer yet gets a while for it."""
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
            self.transport.close()  # an answer that nobody asked for could be taken for the next one's
            return
        self._reject(Refusal(408, "head_too_slow", "the request's head did not come in time", close=True))


_HEAD_TOO_LARGE = Refusal(431, "head_too_large", "the request's head is too large", close=True)
_REASONS = {
    400: b"Bad Request",
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}
