"""A stand-in for a replica, on one event loop: a thousand clients at once are no trouble to it.

It speaks the engine's API as far as the gateway uses it, remembers what it was asked, and can be told to die.
By hand: ``python upstreams.py --token-ms 5``. ``GET /seen`` is what reached it, ``POST /behave`` changes its ways.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn


@dataclass
class Behaviour:
    """``token_ms`` a token; ``status`` of answers; ``die_after`` so many ``tokens``; ``sick``: checks fail."""

    token_ms: float = 1.0
    status: int = 200
    die_after: int = 0
    tokens: int = 0
    sick: bool = False
    hang: bool = False


@dataclass
class _Seen:
    paths: list[str] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    cancelled: int = 0
    running: int = 0
    most: int = 0


behaviour = Behaviour()
seen = _Seen()


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:  # noqa: ANN401 - ASGI
    path = scope["path"]
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    if path == "/health":
        await _answer(send, 500 if behaviour.sick else 200, {})
    elif path == "/seen":
        await _answer(send, 200, vars(seen))
    elif path == "/behave":
        for name, value in json.loads(body).items():
            setattr(behaviour, name, value)
        await _answer(send, 200, vars(behaviour))
    else:
        await _work(scope, path, body, receive, send)


async def _work(scope: dict[str, Any], path: str, body: bytes, receive: Any, send: Any) -> None:  # noqa: ANN401 - ASGI
    request = json.loads(body)
    if len(seen.paths) < 5000:
        seen.paths.append(path)
        seen.bodies.append(request)
        seen.headers.append({name.decode(): value.decode("latin-1") for name, value in scope["headers"]})
    seen.running += 1
    seen.most = max(seen.most, seen.running)
    work = asyncio.ensure_future(_generate(request, path, send))
    gone = asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            seen.cancelled += 1
            work.cancel()
    finally:
        gone.cancel()
        seen.running -= 1
    with contextlib.suppress(asyncio.CancelledError):
        await work


async def _hung_up(receive: Any) -> None:  # noqa: ANN401 - ASGI
    while (await receive())["type"] != "http.disconnect":
        pass


async def _generate(request: dict[str, Any], path: str, send: Any) -> None:  # noqa: ANN401 - ASGI
    if behaviour.hang:
        await asyncio.sleep(3600)
    if behaviour.status != 200:
        await _answer(send, behaviour.status, {"error": {"message": "scripted"}})
        return
    tokens = behaviour.tokens or int(request.get("max_tokens") or 16)
    about = {"object": "chat.completion" if "chat" in path else "text_completion", "model": request["model"]}
    usage = {"prompt_tokens": 8, "completion_tokens": tokens, "total_tokens": 8 + tokens}
    if not request.get("stream"):
        await asyncio.sleep(behaviour.token_ms * tokens / 1000)
        if behaviour.die_after:
            os._exit(9)
        choice = {"index": 0, "text": "x " * tokens, "finish_reason": "length"}
        await _answer(send, 200, {**about, "choices": [choice], "usage": usage})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for index in range(tokens):
        await asyncio.sleep(behaviour.token_ms / 1000)
        if behaviour.die_after and index >= behaviour.die_after:
            os._exit(9)
        await _event(send, {**about, "choices": [{"index": 0, "text": "x " * 8}]})
    if (request.get("stream_options") or {}).get("include_usage"):
        await _event(send, {**about, "choices": [], "usage": usage})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _event(send: Any, document: dict[str, Any]) -> None:  # noqa: ANN401 - ASGI
    data = b"data: " + json.dumps(document).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _answer(send: Any, status: int, document: dict[str, Any]) -> None:  # noqa: ANN401 - ASGI
    body = json.dumps(document).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*head, (b"set-cookie", b"engine=1")]})
    await send({"type": "http.response.body", "body": body})


@dataclass(frozen=True)
class Upstream:
    """A running stand-in."""

    url: str
    process: subprocess.Popen[str]

    def seen(self) -> dict[str, Any]:
        """What reached it."""
        return dict(httpx.get(f"{self.url}/seen").json())

    def behave(self, **changes: Any) -> None:  # noqa: ANN401 - JSON
        """Change how it acts."""
        httpx.post(f"{self.url}/behave", json=changes).raise_for_status()


@contextlib.contextmanager
def upstream(port: int = 0, **options: Any) -> Iterator[Upstream]:  # noqa: ANN401 - as Behaviour has them
    """Run one in a process of its own."""
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    process = subprocess.Popen(
        [sys.executable, __file__, "--port", str(port), *words], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield Upstream(f"http://127.0.0.1:{process.stdout.readline().strip()}", process)
    finally:
        process.kill()
        process.communicate()


class _Server(uvicorn.Server):
    async def startup(self, sockets: Any = None) -> None:  # noqa: ANN401 - as uvicorn has it
        await super().startup(sockets)
        print(self.servers[0].sockets[0].getsockname()[1], flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--token-ms", type=float, default=1.0)
    parser.add_argument("--die-after", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=0)
    arguments = parser.parse_args()
    behaviour.tokens = arguments.tokens
    behaviour.token_ms, behaviour.die_after = arguments.token_ms, arguments.die_after
    _Server(
        uvicorn.Config(
            app, host=arguments.host, port=arguments.port, log_level="critical", lifespan="off", backlog=4096,
            timeout_keep_alive=5,
        )
    ).run()  # fmt: skip
