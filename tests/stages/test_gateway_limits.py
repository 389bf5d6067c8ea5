"""Limits under concurrency, in memory and in a real Redis that two gateways share: exact, and nothing leaks."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from containers.gateway.errors import Refusal
from containers.gateway.keys import Key, Limits
from containers.gateway.ledger import MemoryLedger, RedisLedger
from containers.gateway.limiter import Limiter
from redis_server import redis_server

LIMIT = 1000
Make = Callable[[], list[Limiter]]
Result = TypeVar("Result")
Plan = list[tuple[int, float, float, float | None]]

# Tokens, how long the request runs (ms), the share of them that it uses, and when its client hangs up, if it does (ms).
PLANS = st.lists(
    st.tuples(
        st.integers(1, 400), st.floats(0, 6), st.floats(0, 1), st.one_of(st.none(), st.floats(0, 8))
    ),
    min_size=1, max_size=24,
)  # fmt: skip


def key(name: str, **limits: int) -> Key:
    created = datetime(2026, 1, 1, tzinfo=UTC)
    return Key(id=name, sha256="0" * 64, owner="test", created=created, limits=Limits(**limits))


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(params=["memory", "redis"])
def limiters(request: pytest.FixtureRequest) -> Make:
    """Makes the limiters of gateways that share one fresh store: one in memory, two on Redis."""
    if request.param == "memory":
        return lambda: [Limiter.in_memory(lease_s=600)]
    url = request.getfixturevalue("redis_url")

    def on_redis() -> list[Limiter]:
        with redis.Redis.from_url(url) as client:
            client.flushall()
        return [Limiter.in_redis(url, lease_s=600) for _ in range(2)]

    return on_redis


def run(made: list[Limiter], story: Coroutine[None, None, Result]) -> Result:
    """Tell the story, then close what it used."""

    async def whole() -> Result:
        try:
            return await story
        finally:
            for limiter in made:
                await limiter.close()

    return asyncio.run(whole())


class Book:
    """What an observer outside can swear to: what is surely reserved or used at a moment."""

    def __init__(self) -> None:
        self.open = 0
        self.used = 0
        self.most = 0

    def granted(self, amount: int) -> None:
        self.open += amount
        self.most = max(self.most, self.open + self.used)


async def one(limiter: Limiter, owner: Key, book: Book, amount: int, run_ms: float, share: float) -> None:
    async with limiter.grant(owner, amount) as grant:
        book.granted(amount)
        try:
            await asyncio.sleep(run_ms / 1000)
        finally:
            grant.used = int(amount * share)
            book.open -= amount
            book.used += grant.used


async def hanging_up(work: Awaitable[None], after_ms: float | None) -> None:
    task = asyncio.ensure_future(work)
    if after_ms is not None:
        await asyncio.wait([task], timeout=after_ms / 1000)
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def play(made: list[Limiter], plan: Plan) -> tuple[Book, int]:
    book, owner = Book(), key("0" * 12, tokens_per_minute=LIMIT)
    await asyncio.gather(*(
        hanging_up(one(made[index % len(made)], owner, book, amount, run_ms, share), leaves_ms)
        for index, (amount, run_ms, share, leaves_ms) in enumerate(plan)
    ))  # fmt: skip
    for limiter in made:
        await limiter.settled()
    return book, await made[0]._ledger.charged(owner.id)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=PLANS)
def test_no_interleaving_grants_more_than_the_limit_and_none_leaks(limiters: Make, plan: Plan) -> None:
    made = limiters()

    async def story() -> None:
        book, charged = await play(made, plan)
        assert book.most <= LIMIT
        assert charged == book.used, "all that is left is what was used: no reservation leaked, none was lost"

    run(made, story())


def test_a_thousand_at_once_get_exactly_the_limit(limiters: Make) -> None:
    made = limiters()
    owner = key("1" * 12, tokens_per_minute=LIMIT, requests_per_minute=10_000)
    refusals: list[Refusal] = []

    async def ask(limiter: Limiter) -> bool:
        try:
            async with limiter.grant(owner, 7) as grant:
                grant.used = 7
                await asyncio.sleep(0.01)
        except Refusal as refusal:
            refusals.append(refusal)
            return False
        return True

    async def story() -> list[bool]:
        return await asyncio.gather(*(ask(made[index % len(made)]) for index in range(1000)))

    assert sum(run(made, story())) == LIMIT // 7
    assert {(refusal.status, refusal.code) for refusal in refusals} == {(429, "token_limit")}
    assert all(0 < (refusal.retry_after or 0) <= 60 for refusal in refusals)


def test_requests_are_counted_exactly_and_refused_ones_are_not(limiters: Make) -> None:
    made = limiters()
    owner = key("2" * 12, tokens_per_minute=100, requests_per_minute=20)

    async def ask(limiter: Limiter, tokens: int, used: int) -> str:
        try:
            async with limiter.grant(owner, tokens) as grant:
                grant.used = used
        except Refusal as refusal:
            return refusal.code
        return "ok"

    async def story() -> None:
        # Too large for the limit, and too many tokens: neither counts as a request.
        assert await ask(made[0], 101, 0) == "request_too_large"
        assert await ask(made[0], 100, 60) == "ok"
        assert [await ask(made[-1], 50, 0) for _ in range(30)] == ["token_limit"] * 30
        answers = await asyncio.gather(*(ask(made[index % len(made)], 1, 0) for index in range(40)))
        assert sorted(answers) == ["ok"] * 19 + ["request_limit"] * 21
        # Who was refused for requests holds no tokens.
        assert await made[0]._ledger.charged(owner.id) == 60

    run(made, story())


def test_who_asks_too_often_is_told_before_tokens_are_counted_and_pays_nothing_for_it(limiters: Make) -> None:
    made = limiters()
    owner = key("5" * 12, requests_per_minute=2)

    async def story() -> None:
        for _ in range(5):
            await made[0].refuse_early(owner)
        for _ in range(2):
            async with made[-1].grant(owner, 1):
                pass
        with pytest.raises(Refusal) as refused:
            await made[0].refuse_early(owner)
        assert (refused.value.status, refused.value.code) == (429, "request_limit")

    run(made, story())


def test_parallel_requests_are_bounded_and_give_their_place_back(limiters: Make) -> None:
    made = limiters()
    limiter = made[0]
    owner = key("3" * 12, parallel=1)

    async def story() -> None:
        async with limiter.grant(owner, 10):
            with pytest.raises(Refusal, match="1 requests at a time") as refused:
                async with limiter.grant(owner, 10):
                    pass
            assert refused.value.status == 429
        async with limiter.grant(owner, 10):
            pass
        assert not limiter._running

    run(made, story())


def test_what_a_dead_gateway_left_lapses(redis_url: str) -> None:
    async def story() -> None:
        client = redis.asyncio.Redis.from_url(redis_url)
        dead = RedisLedger(client, 0.2, prefix="lapse", window_s=0.3)
        assert await dead.reserve("key", "a", 100, 100) is None
        assert await dead.reserve("key", "b", 1, 100) is not None
        await asyncio.sleep(0.25)
        assert await dead.charged("key") == 100, "for a window after its lease it counts as used in full"
        assert not await dead.settle("key", "a", 0), "too late"
        await asyncio.sleep(0.3)
        assert await dead.reserve("key", "c", 100, 100) is None
        await client.aclose()

    asyncio.run(story())


def test_a_reservation_that_arrives_after_its_settling_is_not_granted(redis_url: str) -> None:
    async def story() -> None:
        client = redis.asyncio.Redis.from_url(redis_url)
        ledger = RedisLedger(client, 600, prefix="late")
        assert not await ledger.settle("key", "a", 0)
        assert await ledger.reserve("key", "a", 10, 100) is not None
        assert await ledger.charged("key") == 0
        await client.aclose()

    asyncio.run(story())


def test_what_is_a_window_old_is_forgotten_whoever_looks_first(redis_url: str) -> None:
    async def story() -> None:
        client = redis.asyncio.Redis.from_url(redis_url)
        ledger = RedisLedger(client, 600, prefix="old", window_s=0.3)
        assert await ledger.reserve("key", "a", 60, 100) is None
        assert await ledger.settle("key", "a", 60)
        assert not await ledger.settle("key", "late", 0)
        await asyncio.sleep(0.4)
        assert await ledger.reserve("key", "late", 10, 100) is not None, "its settling came before it"
        assert await ledger.charged("key") == 0
        await client.aclose()

    asyncio.run(story())


def test_redis_and_memory_tell_the_same_story(redis_url: str) -> None:
    """The script and the Python are two writings of one law: one sequence, the same answers."""

    async def story() -> None:
        client = redis.asyncio.Redis.from_url(redis_url)
        await client.flushall()
        ledgers = MemoryLedger(600), RedisLedger(client, 600)
        for number in range(60):
            name, amount = str(number), 1 + (number * 37) % 90
            granted = [await each.reserve("key", name, amount, 500) is None for each in ledgers]
            assert granted[0] == granted[1]
            if number % 3 == 0:
                settled = [await each.settle("key", name, amount // 4) for each in ledgers]
                assert settled == granted
            assert await ledgers[0].charged("key") == await ledgers[1].charged("key")
        await client.aclose()

    asyncio.run(story())


def test_nothing_runs_uncounted_while_redis_is_away_and_reservations_survive_a_pause(tmp_path: Path) -> None:
    owner = key("4" * 12, tokens_per_minute=100)
    with redis_server(tmp_path) as url:

        async def story() -> None:
            limiter = Limiter.in_redis(url, lease_s=600)
            with redis.Redis.from_url(url) as client:
                pid = int(client.info("server")["process_id"])
            async with limiter.grant(owner, 80) as grant:
                grant.used = 30
                os.kill(pid, signal.SIGSTOP)
                with pytest.raises(Refusal) as refused:
                    async with limiter.grant(owner, 10):
                        pass
                assert (refused.value.status, refused.value.code) == (503, "limits_unavailable")
                asyncio.get_running_loop().call_later(2.5, os.kill, pid, signal.SIGCONT)
            await limiter.settled()
            assert await limiter._ledger.charged(owner.id) == 30
            await limiter.close()

        asyncio.run(story())


def test_a_gateway_whose_clock_was_set_back_keeps_nobody_waiting_for_it(
    limiters: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> list[float]:
        waits = []
        one = limiters()[0]
        late = time.time
        patient = key("0123456789ab", requests_per_minute=1, tokens_per_minute=100)
        async with one.grant(patient, 40):
            pass
        monkeypatch.setattr(time, "time", lambda: late() - 3600)
        for act in (one.refuse_early(patient), one.grant(patient, 40).__aenter__()):
            with pytest.raises(Refusal) as caught:
                await act
            waits.append(caught.value.retry_after or 0.0)
        await one.close()
        return waits

    assert all(0 < wait <= 60 for wait in asyncio.run(main()))


def test_what_lies_ahead_of_redis_counts_from_now_when_its_clock_was_set_back(redis_url: str) -> None:
    """What an hour later wrote is what Redis has, once its clock is an hour back."""

    async def main(client: redis.Redis) -> None:
        client.flushall()
        limiter = Limiter.in_redis(redis_url, lease_s=600)
        patient = key("0123456789ab", requests_per_minute=1, tokens_per_minute=100)
        async with limiter.grant(patient, 100) as grant:
            grant.used = 100
        for name in client.keys("slipway:tokens:*:settled"):
            scored: Any = client.zrange(name, 0, -1, withscores=True)
            for entry, score in scored:
                client.zadd(name, {entry: score + 3600_000})
        with pytest.raises(Refusal) as caught:
            await limiter.grant(patient, 100).__aenter__()
        assert 0 < (caught.value.retry_after or 0) <= 60
        requests = next(iter(client.keys("slipway:requests*")))
        client.lset(requests, 0, str(time.time() + 3600))
        with pytest.raises(Refusal):
            await limiter._count(patient, limiter._requests.hit)
        await limiter._count(patient, limiter._requests.hit)
        await limiter.close()

    with redis.Redis.from_url(redis_url) as client:
        asyncio.run(main(client))
