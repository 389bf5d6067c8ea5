"""A pool of connections to the replicas whose cost per request does not grow with the number of connections.

httpcore's pool compares every idle connection with every other one, twice per request, and makes a system call for
each: in a profile with about twenty connections, that was a third of the gateway's time. Here each connection is its
own transport, used by one request at a time.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import httpx

# Engines close a connection after five idle seconds. Reusing it at that moment would fail.
_KEEP_ALIVE_S = 4.0
_IDLE_CONNECTIONS = 256

Origin = tuple[str, bytes]


class Connections(httpx.AsyncBaseTransport):
    """A pool that grows as needed. The most recently used connection is reused first, so that surplus ones expire.

    ``buffer`` is the kernel's receive buffer of each, in bytes.
    """

    def __init__(self, buffer: int) -> None:
        self._verify = httpx.create_ssl_context(trust_env=False)
        self._options = [
            (socket.SOL_SOCKET, socket.SO_RCVBUF, buffer),
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        ]
        # Each with the time at which it became idle, the oldest first.
        self._idle: dict[Origin, deque[tuple[float, httpx.AsyncHTTPTransport]]] = {}
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request on a connection that no other request uses. Closing the response frees the connection."""
        origin = (request.url.scheme, request.url.netloc)
        idle = self._idle.get(origin)
        connection = idle.pop()[1] if idle else self._new()
        response = await connection.handle_async_request(request)
        if not isinstance(response.stream, httpx.AsyncByteStream):
            raise TypeError(response.stream)
        response.stream = _Lent(response.stream, partial(self._put_back, origin, connection))
        return response

    async def aclose(self) -> None:
        """Close the idle connections. Those in use are closed by the requests that use them."""
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
        """Close connections that were idle for too long, and surplus ones, including those to removed replicas."""
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
    """A response body that calls a function once it is closed."""

    def __init__(self, stream: httpx.AsyncByteStream, done: Callable[[], Awaitable[None]]) -> None:
        self._stream = stream
        self._done = done

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()
        await self._done()
