"""Connections to the replicas, kept for the next request at a cost that does not grow with their number.

httpcore's pool looks at every idle connection for every other one, twice a request, and asks the kernel about each: in
a profile, with some twenty of them, that was a third of the gateway's time. Here each connection is a transport of its
own, taken by one request at a time.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import httpx

# Engines close a connection that was idle for five seconds; one that is reused just then would break.
_KEEP_ALIVE_S = 4.0
_IDLE_CONNECTIONS = 256

Origin = tuple[str, bytes]


class Connections(httpx.AsyncBaseTransport):
    """As many connections as are needed; the one that was used last is used first, so that those not needed expire.

    ``buffer`` is the kernel's receive buffer of each, in bytes.
    """

    def __init__(self, buffer: int) -> None:
        self._verify = httpx.create_ssl_context(trust_env=False)
        self._options = [
            (socket.SOL_SOCKET, socket.SO_RCVBUF, buffer),
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        ]
        # With each, when it was put there: the oldest first.
        self._idle: dict[Origin, deque[tuple[float, httpx.AsyncHTTPTransport]]] = {}
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request on a connection of its own, which is free again once the response is closed."""
        origin = (request.url.scheme, request.url.netloc)
        idle = self._idle.get(origin)
        connection = idle.pop()[1] if idle else self._new()
        response = await connection.handle_async_request(request)
        if not isinstance(response.stream, httpx.AsyncByteStream):
            raise TypeError(response.stream)
        response.stream = _Lent(response.stream, partial(self._put_back, origin, connection))
        return response

    async def aclose(self) -> None:
        """Close what is idle; what is in use is closed by who uses it."""
        self._closed = True
        await self._close_idle()

    def _new(self) -> httpx.AsyncHTTPTransport:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=1, keepalive_expiry=_KEEP_ALIVE_S)
        return httpx.AsyncHTTPTransport(
            verify=self._verify, limits=limits, socket_options=self._options, trust_env=False
        )

    async def _put_back(self, origin: Origin, connection: httpx.AsyncHTTPTransport) -> None:
        self._idle.setdefault(origin, deque()).append((time.monotonic(), connection))
        await self._close_idle()

    async def _close_idle(self) -> None:
        """Close what is too old to be used again, or too much; of a replica that is no more, too."""
        oldest = time.monotonic() - _KEEP_ALIVE_S
        gone = []
        for origin, idle in list(self._idle.items()):
            while idle and (self._closed or idle[0][0] < oldest or len(idle) > _IDLE_CONNECTIONS):
                gone.append(idle.popleft()[1])
            if not idle:
                del self._idle[origin]
        for connection in gone:
            await connection.aclose()


class _Lent(httpx.AsyncByteStream):
    """A response's body, with what is to be done once it is closed."""

    def __init__(self, stream: httpx.AsyncByteStream, done: Callable[[], Awaitable[None]]) -> None:
        self._stream = stream
        self._done = done

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()
        await self._done()
