"""Handling of one request: authentication, parsing, limits, and passing on the answer of a replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from containers.gateway import reading, trace
from containers.gateway.account import Account
from containers.gateway.errors import CLIENT_CLOSED, Refusal
from containers.gateway.limiter import Grant
from containers.gateway.protocol import abort
from containers.gateway.router import Pool
from containers.gateway.schema import ChatRequest, CompletionRequest, forwarded
from containers.gateway.sse import StreamError, StreamMeter
from containers.gateway.upstream import Call, Opened, metered

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

    from containers.gateway.gateway import Gateway
    from containers.gateway.keys import Key

_SLICE = 64 * 1024


class Exchange(Response):
    """The answer to a generation request. It reads the body itself, after authentication."""

    def __init__(self, gateway: Gateway, kind: type[ChatRequest | CompletionRequest], path: str) -> None:
        super().__init__()
        self._gateway = gateway
        self._kind = kind
        self._path = path
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request. The client always gets a complete answer or a closed connection, and it is logged."""
        self._scope, self._send = scope, send
        self._account = Account(trace.begin(dict(scope["headers"])), self._path)
        try:
            await self._answer(receive)
        except Refusal as refusal:
            self._account.status, self._account.code = refusal.status, refusal.code
            with suppress(ClientDisconnect):
                await self._refuse(refusal)
        except ClientDisconnect:
            self._account.status, self._account.code = CLIENT_CLOSED, "hung_up"
            abort(scope)
        finally:
            self._gateway.tell(self._account)

    async def _answer(self, receive: Receive) -> None:
        gateway, account = self._gateway, self._account
        headers = reading.headers(self._scope)
        key = await gateway.authenticate(headers, self._scope.get("client"))
        account.key = key.id
        # Checked first: a client above its limits must not cause the work of reading, parsing and counting tokens.
        await gateway.limiter.refuse_early(key)
        async with self._counting_rejections(key):
            request = await self._read(key, receive, headers)
        async with _while_connected(receive):
            async with self._counting_rejections(key):
                pool = gateway.pool(request.model, key)
                account.model, account.stream = request.model, request.stream
                account.prompt_tokens = await reading.prompt_tokens(pool, request)
                longest = reading.longest_answer(pool, request, account.prompt_tokens)
                tokens = account.prompt_tokens + longest * request.prompts * request.n
            async with gateway.limiter.grant(key, tokens) as grant:
                account.overhead_s = time.monotonic() - account.started
                opened = await self._relay(pool, self._call(pool, request, longest, tokens), request, grant)
        # The usage is settled before the last byte is sent, so that the client's next request counts correctly.
        await self._finish(opened)

    async def _read(
        self, key: Key, receive: Receive, headers: Mapping[bytes, bytes]
    ) -> ChatRequest | CompletionRequest:
        """Read and parse the body, which is not stored."""
        intake, settings = self._gateway.intake, self._gateway.settings
        declared = headers.get(b"content-length")
        async with intake.place(key, None if declared is None else int(declared)):
            body = await reading.body(receive, headers, settings.max_body_bytes, settings.body_timeout_s)
            async with intake.turn(len(body)):
                return reading.parsed(self._kind, body, headers)

    @asynccontextmanager
    async def _counting_rejections(self, key: Key) -> AsyncIterator[None]:
        """Count an invalid request that the block refuses. Requests refused by a limit (429) are not counted."""
        try:
            yield
        except Refusal as refusal:
            if refusal.status != httpx.codes.TOO_MANY_REQUESTS and refusal.status < httpx.codes.INTERNAL_SERVER_ERROR:
                await self._gateway.limiter.count_rejected(key)
            raise

    def _call(self, pool: Pool, request: ChatRequest | CompletionRequest, longest: int, tokens: int) -> Call:
        """Make the engine's request: the client's keys, the release's name, and no longer answer than reserved."""
        changes: dict[str, Any] = {
            "model": pool.served_as(request.model),
            "max_tokens": longest,
            "max_completion_tokens": None,
            "stream_options": {"include_usage": True} if request.stream else None,
        }
        headers = {**self._account.trace.headers(), **self._gateway.engine_headers}
        headers["accept"] = "text/event-stream" if request.stream else "application/json"
        document = forwarded(request, changes)
        return Call(self._path, document, headers, tokens, request.stream, request.model)

    async def _relay(self, pool: Pool, call: Call, request: ChatRequest | CompletionRequest, grant: Grant) -> Opened:
        """Pass the answer on, except for its end, and return the tokens it used."""
        account = self._account
        include_usage = request.stream_options is not None and request.stream_options.include_usage
        meter = StreamMeter(model=request.model, hide_usage=not include_usage)
        try:
            async with self._gateway.upstream.ask(pool, call) as opened:
                self._name_replica(call)
                if opened.rest is not None:
                    await self._stream(opened, meter)
                else:
                    reading.check(opened, meter)
                account.status = opened.status
            return opened
        finally:
            account.queued_s = call.queued_s
            self._name_replica(call)
            if self._begun or account.status == httpx.codes.OK:
                account.prompt_tokens = meter.prompt_tokens or account.prompt_tokens
                account.completion_tokens = meter.completion_tokens
                grant.used = account.prompt_tokens + account.completion_tokens
            elif call.sent:
                # The client left while the engine was working, so the usage is unknown: charge all that was reserved.
                grant.used = grant.reserved

    def _name_replica(self, call: Call) -> None:
        if call.replica is not None:
            self._account.replica, self._account.release = call.replica.name, call.replica.release

    async def _stream(self, opened: Opened, meter: StreamMeter) -> None:
        """Pass events on as they arrive. A stream that breaks ends with an event that says so."""
        account = self._account
        account.first_s = time.monotonic() - account.started
        account.status = httpx.codes.OK
        await self._start(httpx.codes.OK, b"text/event-stream; charset=utf-8", [(b"cache-control", b"no-store")])
        try:
            async for events in metered(opened, meter):
                await self._write(events)
        except (StreamError, httpx.HTTPError):
            meter.whole = False
        if not meter.whole:
            account.code = "stream_broken"
            self._gateway.metrics.broken.labels(account.model).inc()
            broken = Refusal(502, "stream_broken", "the model's server stopped during the answer, which is incomplete")
            await self._write(b"data: " + broken.body() + b"\n\n")

    async def _finish(self, opened: Opened) -> None:
        if opened.rest is None:
            length = [(b"content-length", str(len(opened.body)).encode())]
            await self._start(opened.status, b"application/json", length)
            for start in range(0, len(opened.body), _SLICE):
                await self._write(opened.body[start : start + _SLICE])
        await self._write(b"", more=False)

    async def _refuse(self, refusal: Refusal) -> None:
        if self._begun:
            await self._write(b"", more=False)
            return
        body = refusal.body()
        length = (b"content-length", str(len(body)).encode())
        await self._start(refusal.status, b"application/json", [length, *refusal.headers()])
        await self._write(body, more=False)

    async def _start(self, status: int, kind: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """Send status and headers. None are copied from the engine: they would reveal its name, version and cookies."""
        account = self._account
        self._begun = True
        told = [(b"content-type", kind), (b"x-request-id", account.trace.request_id.encode()), *headers]
        told.append((b"traceparent", account.trace.parent.encode()))
        if account.release != "-":
            told.append((b"x-slipway-release", account.release.encode()))
        await self._put({"type": "http.response.start", "status": int(status), "headers": told})

    async def _write(self, body: bytes, *, more: bool = True) -> None:
        await self._put({"type": "http.response.body", "body": body, "more_body": more})

    async def _put(self, message: Message) -> None:
        """Send a part once the client has read the earlier ones. A client that stops reading counts as disconnected."""
        try:
            async with asyncio.timeout(self._gateway.settings.stall_timeout_s):
                await self._send(message)
        except TimeoutError:
            raise ClientDisconnect from None


@asynccontextmanager
async def _while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block when the client disconnects, and raise ``ClientDisconnect``."""
    task = asyncio.current_task()
    left = False

    async def listen() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        if task is not None:
            task.cancel()

    listener = asyncio.ensure_future(listen())
    try:
        yield
    except asyncio.CancelledError:
        if left and task is not None:
            task.uncancel()
            raise ClientDisconnect from None
        raise
    finally:
        listener.cancel()
