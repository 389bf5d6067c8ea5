"""Sends a request to a replica, and to another one if that fails before the client received anything."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import httpx

from containers.gateway.config import GatewaySettings
from containers.gateway.errors import Refusal
from containers.gateway.metrics import Metrics
from containers.gateway.replicas import Replica
from containers.gateway.router import Lease, Pool
from containers.gateway.sse import StreamMeter

# Sent with every request to a replica.
HEADERS = {"user-agent": "slipway-gateway", "accept-encoding": "identity"}
# After an answer with one of these statuses, the request is retried once at another replica.
_AGAIN = frozenset({500, 502, 503, 504})
# If a replica dies during a request, the request may be the cause. So it is sent to two replicas at most.
DELIVERIES = 2
# A refused connection is cheap. After this many, the request fails.
_REFUSALS = 8


class _Lost(Exception):
    """The replica disappeared while this request waited for its answer."""


@dataclass
class Call:
    """A request for the engine. ``tokens`` count as outstanding while it runs; ``sent``: a replica has received it."""

    path: str
    document: Mapping[str, Any]
    headers: Mapping[str, str]
    tokens: int
    stream: bool
    model: str
    tried: list[Replica] = field(default_factory=list)
    sent: bool = False
    queued_s: float = 0.0
    replica: Replica | None = None


@dataclass
class Opened:
    """A replica's answer. ``body`` is all of it, or the first part of a stream; ``rest`` has the others."""

    status: int
    body: bytes
    rest: AsyncIterator[bytes] | None


class Upstream:
    """Sends requests to the replicas, as if they were one server."""

    def __init__(self, settings: GatewaySettings, connections: httpx.AsyncBaseTransport, metrics: Metrics) -> None:
        """Use ``connections`` directly: httpx's client adds a sixth to the work, for cookies, redirects and logins."""
        self._settings = settings
        self._connections = connections
        timeout = httpx.Timeout(
            settings.request_timeout_s, connect=settings.connect_timeout_s, write=settings.stall_timeout_s, pool=None
        )
        self._timeouts = {"timeout": timeout.as_dict()}
        self._metrics = metrics

    @asynccontextmanager
    async def ask(self, pool: Pool, call: Call) -> AsyncIterator[Opened]:
        """Yield the first good answer. Its slot and its connection are returned after the block.

        The request is retried at another replica if the connection fails or the status is 500, 502, 503 or 504, before
        the first byte of a stream or before the end of any other answer. Leaving the block early closes the
        connection, which makes the engine stop.

        Raises:
            Refusal: 502 if no replica answered, 503 if none became free in time.
        """
        deliveries = refusals = 0
        while True:
            lease = await self._place(pool, call)
            answer: httpx.Response | None = None
            try:
                try:
                    answer, opened = await self._try(lease, call)
                except httpx.ConnectError:
                    lease.replica.refused()
                    refusals += 1
                    problem = "refuses connections"
                except httpx.ConnectTimeout:
                    lease.replica.answered(0)
                    refusals += 1
                    problem = "takes no connections"
                except (httpx.HTTPError, _Lost) as error:
                    lease.replica.answered(0)
                    deliveries += 1
                    problem = "broke off" if not isinstance(error, httpx.TimeoutException) else "took too long"
                else:
                    lease.replica.answered(opened.status)
                    deliveries += 1
                    self._metrics.attempts.labels(lease.replica.name, opened.status).inc()
                    if opened.status not in _AGAIN:
                        yield opened
                        return
                    problem = f"answered {opened.status}"
                if not problem.startswith("answered"):
                    self._metrics.attempts.labels(lease.replica.name, "error").inc()
            finally:
                lease.release()
                if answer is not None:
                    await answer.aclose()
            if deliveries >= DELIVERIES or refusals >= _REFUSALS:
                raise Refusal(502, "replica_failed", f"the model's server {problem}; this request may be sent again")
            call.tried.append(lease.replica)
            self._metrics.retries.labels(call.model).inc()

    async def _place(self, pool: Pool, call: Call) -> Lease:
        started = time.monotonic()
        lease = await pool.place(call.tokens, call.tried, self._settings.queue_size, self._settings.queue_timeout_s)
        call.queued_s += time.monotonic() - started
        call.replica = lease.replica
        # The route may have changed while this request waited, so the model's name is that of the chosen release.
        return lease

    async def _try(self, lease: Lease, call: Call) -> tuple[httpx.Response, Opened]:
        """Send the request to one replica and read to the first part of a stream or the end of any other answer."""
        request = httpx.Request(
            "POST",
            _address(lease.replica.url, call.path),
            content=json.dumps(call.document).encode(),
            headers={**HEADERS, "content-type": "application/json", **call.headers},
            extensions=self._timeouts,
        )
        try:
            call.sent = True
            answer = await self._connections.handle_async_request(request)
            try:
                opened = await self._open(answer, call)
            except BaseException:  # including cancellation: the connection must not stay open
                await answer.aclose()
                raise
        except httpx.HTTPError:
            call.sent = False
            raise
        except asyncio.CancelledError:
            if lease.running.lost and lease.running.task is not None:
                lease.running.task.uncancel()
                call.sent = False
                raise _Lost from None
            raise
        finally:
            lease.running.task = None  # from here on, losing the replica no longer cancels this request
        call.sent = opened.status == httpx.codes.OK
        return answer, opened

    async def _open(self, answer: httpx.Response, call: Call) -> Opened:
        if call.stream and answer.status_code == httpx.codes.OK:
            pieces = answer.aiter_raw()
            first = await anext(pieces, b"")
            if not first:
                raise httpx.RemoteProtocolError("the stream ended before its first event")
            return Opened(answer.status_code, first, pieces)
        parts, size = [], 0
        async for part in answer.aiter_raw():
            parts.append(part)
            size += len(part)
            if size > self._settings.max_answer_bytes:
                raise Refusal(
                    502, "answer_too_large", "the model's server sent a larger answer than this gateway allows"
                )
        return Opened(answer.status_code, b"".join(parts), None)


@lru_cache(maxsize=256)
def _address(url: str, path: str) -> httpx.URL:
    return httpx.URL(f"{url}{path}")


async def metered(opened: Opened, meter: StreamMeter) -> AsyncIterator[bytes]:
    """Yield the events of a stream as they arrive.

    Raises:
        StreamError, httpx.HTTPError: The stream broke.
    """
    if ready := meter.feed(opened.body):
        yield ready
    if opened.rest is not None:
        async for piece in opened.rest:
            if ready := meter.feed(piece):
                yield ready
