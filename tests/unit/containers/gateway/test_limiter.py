"""What a key is refused, by the limits of one gateway; `tests/stages/test_gateway_limits.py` has them in Redis too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime

import pytest

from containers.gateway.errors import Refusal
from containers.gateway.keys import Key, Limits
from containers.gateway.limiter import Limiter


class Clock:
    """Seconds that pass as they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(**limits: int) -> Key:
    return Key(
        id="0" * 12, sha256="0" * 64, owner="o", created=datetime(2026, 1, 1, tzinfo=UTC), limits=Limits(**limits)
    )


def refused(story: Callable[[Limiter, Clock], Coroutine[None, None, None]]) -> Refusal:
    """What ends a story of one gateway."""

    async def run() -> None:
        clock = Clock()
        await story(Limiter.in_memory(lease_s=600, wrong_keys=2, clock=clock), clock)

    with pytest.raises(Refusal) as caught:
        asyncio.run(run())
    return caught.value


async def use(limiter: Limiter, owner: Key, tokens: int) -> None:
    async with limiter.grant(owner, tokens) as grant:
        grant.used = tokens
    await limiter.settled()  # an answer waits for half a second at most, and a busy machine may take longer


def test_tokens_that_were_used_count_for_a_minute() -> None:
    owner = key(tokens_per_minute=100)

    async def story(limiter: Limiter, clock: Clock) -> None:
        await use(limiter, owner, 100)
        clock.now += 61
        await use(limiter, owner, 60)
        clock.now += 10
        await use(limiter, owner, 60)

    refusal = refused(story)
    assert (refusal.status, refusal.code, refusal.retry_after) == (429, "token_limit", 50.0)


def test_requests_count_for_a_minute_and_what_is_left_to_wait_is_said() -> None:
    owner = key(requests_per_minute=2)

    async def story(limiter: Limiter, clock: Clock) -> None:
        await use(limiter, owner, 1)
        clock.now += 61
        await use(limiter, owner, 1)
        clock.now += 10
        await use(limiter, owner, 1)
        await use(limiter, owner, 1)

    refusal = refused(story)
    assert (refusal.status, refusal.code, refusal.retry_after) == (429, "request_limit", 50.0)


def test_a_request_that_is_larger_than_the_limit_is_no_question_of_waiting() -> None:
    async def story(limiter: Limiter, _: Clock) -> None:
        await use(limiter, key(tokens_per_minute=100), 101)

    refusal = refused(story)
    assert (refusal.status, refusal.code, refusal.retry_after) == (400, "request_too_large", None)


def test_requests_at_a_time_are_limited_early_and_late() -> None:
    owner = key(parallel=1)

    async def late(limiter: Limiter, _: Clock) -> None:
        async with limiter.grant(owner, 1):
            await use(limiter, owner, 1)

    async def early(limiter: Limiter, _: Clock) -> None:
        async with limiter.grant(owner, 1):
            await limiter.refuse_early(owner)

    assert refused(late).code == refused(early).code == "parallel_limit"


def test_wrong_keys_of_an_address_are_limited() -> None:
    async def story(limiter: Limiter, _: Clock) -> None:
        for _unused in range(3):
            await limiter.refuse_guessing("10.0.0.1")

    assert refused(story).code == "too_many_wrong_keys"
