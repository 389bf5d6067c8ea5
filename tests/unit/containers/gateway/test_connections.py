"""The gateway's connections to a replica: used again, never shared, never too old."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from containers.gateway import connections
from containers.gateway.connections import Connections

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class Replica:
    """Answers with `ok`; counts the connections that were made and are open."""

    def __init__(self) -> None:
        self.made = self.open = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.made += 1
        self.open += 1
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(ANSWER + b"o")
                await asyncio.sleep(0.02)
                writer.write(b"k")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def replica() -> AsyncIterator[Replica]:
    made = Replica()
    async with await asyncio.start_server(made.serve, "127.0.0.1", 0) as server:
        made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield made


def run(work: Callable[[Replica, httpx.AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with replica() as serving:
            async with httpx.AsyncClient(transport=Connections(65536)) as client:
                await work(serving, client)
            await asyncio.sleep(0.05)
            assert serving.open == 0

    asyncio.run(main())


def test_requests_one_after_the_other_use_one_connection_and_those_at_once_one_each() -> None:
    async def work(serving: Replica, client: httpx.AsyncClient) -> None:
        for _ in range(3):
            assert (await client.get(serving.url)).text == "ok"
        assert serving.made == 1
        for _ in range(2):
            answers = await asyncio.gather(*(client.get(serving.url) for _ in range(5)))
            assert {answer.text for answer in answers} == {"ok"}
        assert serving.made == 5

    run(work)


def test_a_connection_whose_answer_was_left_unread_is_closed() -> None:
    async def work(serving: Replica, client: httpx.AsyncClient) -> None:
        async with client.stream("GET", serving.url):
            pass
        await asyncio.sleep(0.05)
        assert serving.open == 0
        assert (await client.get(serving.url)).text == "ok"
        assert serving.made == 2

    run(work)


def test_what_was_idle_for_long_is_not_used_again_and_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_KEEP_ALIVE_S", 0.05)

    async def work(serving: Replica, client: httpx.AsyncClient) -> None:
        await asyncio.gather(*(client.get(serving.url) for _ in range(4)))
        await asyncio.sleep(0.1)
        assert (await client.get(serving.url)).text == "ok"
        await asyncio.sleep(0.02)
        assert (serving.made, serving.open) == (5, 1)

    run(work)


def test_no_more_than_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_IDLE_CONNECTIONS", 2)

    async def work(serving: Replica, client: httpx.AsyncClient) -> None:
        await asyncio.gather(*(client.get(serving.url) for _ in range(6)))
        await asyncio.sleep(0.05)
        assert serving.open == 2

    run(work)


def test_a_replica_that_refuses_is_told_as_such() -> None:
    async def work(_: Replica, client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.ConnectError):
            await client.get("http://127.0.0.1:1")

    run(work)
