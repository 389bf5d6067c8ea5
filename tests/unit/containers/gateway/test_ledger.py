"""The law of the ledger, for every interleaving of reserving, settling, dying and waiting that hypothesis thinks of."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from containers.gateway.ledger import WINDOW_S, MemoryLedger, Refused

LIMIT, LEASE_S = 100, 45.0


def now(operation: Awaitable[object]) -> object:
    """Run an operation that never waits."""
    return asyncio.run(operation)  # type: ignore[arg-type]


class Ledger(RuleBasedStateMachine):
    """A ledger beside a model that keeps every event since the beginning and counts naively."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 1000.0
        self.ledger = MemoryLedger(LEASE_S, lambda: self.time)
        self.open: dict[str, tuple[int, float]] = {}
        self.charges: list[tuple[float, int]] = []
        self.names = iter(range(10**6))

    def counted(self) -> int:
        for name, (amount, lease) in list(self.open.items()):
            if lease <= self.time:
                self.charges.append((lease, amount))
                del self.open[name]
        recent = sum(amount for when, amount in self.charges if when + WINDOW_S > self.time)
        return recent + sum(amount for amount, _ in self.open.values())

    @rule(amount=st.integers(1, LIMIT))
    def reserve(self, amount: int) -> None:
        before, name = self.counted(), str(next(self.names))
        refused = now(self.ledger.reserve("key", name, amount, LIMIT))
        # Granted exactly where there is room: never more than the limit, never less than there is.
        assert (refused is None) == (before + amount <= LIMIT)
        if refused is None:
            self.open[name] = (amount, self.time + LEASE_S)
        else:
            assert isinstance(refused, Refused)
            assert 0 < refused.wait_s <= WINDOW_S

    @precondition(lambda self: self.open)
    @rule(data=st.data(), share=st.floats(0, 1))
    def settle(self, data: st.DataObject, share: float) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        amount, lease = self.open[name]
        used = int(amount * share)
        settled = now(self.ledger.settle("key", name, used))
        assert settled == (lease > self.time)
        if settled:
            del self.open[name]
            self.charges.append((self.time, used))
        assert not now(self.ledger.settle("key", name, amount)), "settling twice charges once"

    @rule(seconds=st.floats(0, 70))
    def wait(self, seconds: float) -> None:
        self.time += seconds

    @invariant()
    def is_what_the_model_says(self) -> None:
        assert now(self.ledger.charged("key")) == self.counted() <= LIMIT

    def teardown(self) -> None:
        # Whatever happened, gateways that died among it: a lease and a minute later everything can be had again.
        self.time += LEASE_S + WINDOW_S
        assert now(self.ledger.charged("key")) == 0
        assert now(self.ledger.reserve("key", "all", LIMIT, LIMIT)) is None


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_wait_is_as_long_as_it_must_be() -> None:
    clock = [0.0]
    ledger = MemoryLedger(LEASE_S, lambda: clock[0])

    async def story() -> None:
        assert await ledger.reserve("key", "a", 60, LIMIT) is None
        clock[0] = 10.0
        await ledger.settle("key", "a", 60)
        refused = await ledger.reserve("key", "b", 50, LIMIT)
        assert refused == Refused(WINDOW_S)
        clock[0] = 10.0 + WINDOW_S
        assert await ledger.reserve("key", "b", 50, LIMIT) is None

    asyncio.run(story())


def test_no_wait_is_longer_than_the_minute_by_a_rounding() -> None:
    now = 990.9
    ledger = MemoryLedger(LEASE_S, lambda: now)

    async def story() -> None:
        await ledger.reserve("key", "a", 60, LIMIT)
        await ledger.settle("key", "a", 60)
        assert await ledger.reserve("key", "b", 50, LIMIT) == Refused(WINDOW_S)

    assert now + WINDOW_S - now > WINDOW_S
    asyncio.run(story())


def test_one_key_does_not_pay_for_another() -> None:
    ledger = MemoryLedger(LEASE_S)

    async def story() -> None:
        assert await ledger.reserve("one", "a", LIMIT, LIMIT) is None
        assert await ledger.reserve("two", "b", LIMIT, LIMIT) is None
        assert await ledger.reserve("one", "c", 1, LIMIT) is not None

    asyncio.run(story())
