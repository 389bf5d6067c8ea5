"""What a web server on loopback answers, and to whom: its own pages, programs, and links from elsewhere."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pipeline.serving.guard import Guard, origins_of

OWN = "http://127.0.0.1:3000"
HOST = {"host": "127.0.0.1:3000"}
POST = {"method": "POST", "path": "/graphql"}


async def application(scope: Any, _receive: Any, send: Any) -> None:  # noqa: ANN401 - as ASGI has it
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"answered"})


def asked(headers: dict[str, str] | list[tuple[str, str]], **scope: str) -> list[dict[str, Any]]:
    """What a request is answered with."""
    items = headers.items() if isinstance(headers, dict) else headers
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:  # noqa: ANN401 - as ASGI has it
        sent.append(dict(message))

    async def receive() -> Any:  # noqa: ANN401 - as ASGI has it
        raise AssertionError("nothing is read")

    raw = [(name.encode(), value.encode()) for name, value in items]
    whole = {**({} if "type" in scope else {"type": "http", "method": "GET"}), "path": "/", **scope, "headers": raw}
    asyncio.run(Guard(application, [OWN, "https://slipway.example"])(whole, receive, send))
    return sent


@pytest.mark.parametrize(
    ("headers", "scope"),
    [
        (HOST, {}),
        (HOST, POST),  # a program
        ({**HOST, "origin": OWN, "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, POST),
        ({"host": "slipway.example", "origin": "https://slipway.example"}, POST),
        ({**HOST, "sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, {}),
        ({**HOST, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, {"path": "/runs/1"}),  # a link
    ],
)
def test_its_own_pages_programs_and_links_are_answered(headers: dict[str, str], scope: dict[str, str]) -> None:
    start, body = asked(headers, **scope)
    assert (start["status"], body["body"]) == (200, b"answered")
    assert (b"x-frame-options", b"SAMEORIGIN") in start["headers"]


@pytest.mark.parametrize(
    ("headers", "scope"),
    [
        ({"host": "attacker.example:3000"}, POST),
        ({"host": "attacker.example:3000"}, {}),
        ({"host": "127.0.0.1:3001"}, {}),
        ({"host": "127.0.0.1:3000.attacker.example"}, {}),
        ({}, {}),
        ([("host", "127.0.0.1:3000"), ("host", "attacker.example")], {}),
        ({**HOST, "origin": "https://attacker.example"}, POST),
        ({**HOST, "origin": "http://localhost:8000"}, POST),
        ({**HOST, "origin": "null"}, POST),
        ({**HOST, "origin": ""}, POST),
        ({**HOST, "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, {"path": "/runs/1"}),
        ({**HOST, "sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, {}),
        ({**HOST, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, {"path": "/graphql"}),
        ({**HOST, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, {"path": "/ajax-api/2.0/mlflow/x"}),
        ({**HOST, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, {"method": "POST", "path": "/x"}),
        (HOST, {"path": "/graphql"}),  # by GET, from a browser that tells nothing
        (HOST, {"path": "/graphql/"}),
        (HOST, {"path": "/graphql", "method": "PUT"}),
    ],
)
def test_other_pages_and_names_are_refused(headers: dict[str, str], scope: dict[str, str]) -> None:
    start, body = asked(headers, **scope)
    assert start["status"] == 403
    assert body["body"].startswith(b"Refused by Slipway")


def test_a_web_socket_is_for_its_own_pages() -> None:
    scope = {"type": "websocket", "path": "/graphql"}
    assert asked({**HOST, "origin": OWN}, **scope) == [{"type": "websocket.accept"}]
    assert asked(HOST, **scope) == [{"type": "websocket.accept"}]  # a program
    for headers in ({**HOST, "origin": "https://attacker.example"}, {"host": "attacker.example", "origin": OWN}):
        assert asked(headers, **scope) == [{"type": "websocket.close", "code": 1008}]


def test_where_no_origin_is_told_nothing_is_answered() -> None:
    assert origins_of({}) == []
    assert Guard(application, origins_of({})).refusal({"headers": [(b"host", b"")], "method": "GET", "path": "/"})
