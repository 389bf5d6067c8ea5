"""Exact accounting of tokens per minute: reserved before a request runs, settled afterwards.

Invariant, at every moment and for every key:

    (open reservations) + (amounts settled within the last minute) ≤ limit     whenever a reservation is granted

A reservation counts in full until it is settled; from then on the tokens actually used count for a minute. A gateway
that dies leaves its reservations open. Each has a lease: when it ends, the reservation counts as used in full. So
nothing is granted twice and nothing stays reserved for ever. Settling is idempotent. It may charge more than was
reserved, if more was used: later requests then wait longer.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from redis.asyncio import Redis

WINDOW_S = 60.0


@dataclass(frozen=True)
class Refused:
    """A reservation that was not granted. It would be after ``wait_s`` seconds, if nothing else changed."""

    wait_s: float


class Ledger(Protocol):
    """Storage of reservations. ``reserve`` returns None if the amount was granted."""

    async def reserve(self, key: str, reservation: str, amount: int, limit: int) -> Refused | None:
        """Reserve ``amount`` of ``limit`` under an id that was never used before."""
        ...

    async def settle(self, key: str, reservation: str, used: int) -> bool:
        """Replace the reservation by the amount used; False if it was settled before or its lease had ended."""
        ...

    async def charged(self, key: str) -> int:
        """Return the tokens that count against the key now."""
        ...


@dataclass
class _Account:
    """``open`` has amounts with the ends of their leases, earliest first, since all leases have the same length."""

    open: dict[str, tuple[int, float]] = field(default_factory=dict)
    settled: deque[tuple[float, int]] = field(default_factory=deque)
    total: int = 0


class MemoryLedger:
    """For a single gateway. No operation awaits between reading and writing, so each is atomic on one event loop."""

    def __init__(self, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    async def reserve(self, key: str, reservation: str, amount: int, limit: int) -> Refused | None:
        """See `Ledger`."""
        now = self._clock()
        account = self._accounts.setdefault(key, _Account())
        _advance(account, now)
        if account.total + amount > limit:
            return Refused(_wait(account, now, account.total + amount - limit))
        account.open[reservation] = (amount, now + self._lease_s)
        account.total += amount
        return None

    async def settle(self, key: str, reservation: str, used: int) -> bool:
        """See `Ledger`."""
        now = self._clock()
        account = self._accounts.get(key)
        if account is None:
            return False
        _advance(account, now)
        if reservation not in account.open:
            return False
        amount, _ = account.open.pop(reservation)
        account.total += used - amount
        if used:
            account.settled.append((now, used))
        if not account.open and not account.settled:
            del self._accounts[key]
        return True

    async def charged(self, key: str) -> int:
        """See `Ledger`."""
        account = self._accounts.get(key)
        if account is None:
            return 0
        _advance(account, self._clock())
        return account.total


def _advance(account: _Account, now: float) -> None:
    """Settle reservations whose lease ended, and drop amounts older than a minute."""
    lapsed = list(itertools.takewhile(lambda item: item[1][1] <= now, account.open.items()))
    if lapsed:
        for name, _ in lapsed:
            del account.open[name]
        account.settled = deque(sorted([*account.settled, *((lease, amount) for _, (amount, lease) in lapsed)]))
    while account.settled and account.settled[0][0] + WINDOW_S <= now:
        account.total -= account.settled.popleft()[1]


def _wait(account: _Account, now: float, missing: int) -> float:
    """Seconds until enough settled tokens are a minute old; one second if open reservations are in the way."""
    for when, amount in account.settled:
        missing -= amount
        if missing <= 0:
            return min(when + WINDOW_S - now, WINDOW_S)  # which a rounded sum can be above
    return 1.0


# The same as one atomic Redis script, in milliseconds of Redis's clock. A member of `settled` is ID:AMOUNT. `closed`
# has ids that were settled before they were reserved: when Redis hangs and the sender gives up, a reservation can
# arrive after its own settlement, and nobody would settle it again.
_ADVANCE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local window = tonumber(ARGV[1])
-- What was settled in the future was so before the clock was set back: it counts from now.
for _, entry in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '(' .. now, '+inf')) do
  redis.call('ZADD', KEYS[3], now, entry)
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)) do
  redis.call('ZADD', KEYS[3], redis.call('ZSCORE', KEYS[1], id), id .. ':' .. redis.call('HGET', KEYS[2], id))
  redis.call('ZREM', KEYS[1], id)
  redis.call('HDEL', KEYS[2], id)
end
local total = tonumber(redis.call('GET', KEYS[4]) or '0')
local gone = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now - window)
for _, entry in ipairs(gone) do
  total = total - tonumber(string.match(entry, ':(%d+)$'))
  redis.call('ZREM', KEYS[3], entry)
end
if #gone > 0 then redis.call('SET', KEYS[4], total, 'KEEPTTL') end
redis.call('ZREMRANGEBYSCORE', KEYS[5], '-inf', now - 10 * window)
local function keep(milliseconds)
  for _, key in ipairs(KEYS) do
    if redis.call('PTTL', key) < milliseconds then redis.call('PEXPIRE', key, milliseconds) end
  end
end
"""
_RESERVE = (
    _ADVANCE
    + """
local amount, limit, lease = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. (now + lease), '+inf')) do
  redis.call('ZADD', KEYS[1], now + lease, id)
end
if redis.call('ZSCORE', KEYS[5], ARGV[2]) then return 1000 end
if total + amount > limit then
  local missing = total + amount - limit
  for _, entry in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
    missing = missing - tonumber(string.match(entry, ':(%d+)$'))
    if missing <= 0 then return redis.call('ZSCORE', KEYS[3], entry) + window - now end
  end
  return 1000
end
redis.call('ZADD', KEYS[1], now + lease, ARGV[2])
redis.call('HSET', KEYS[2], ARGV[2], amount)
redis.call('SET', KEYS[4], total + amount, 'KEEPTTL')
keep(lease + 2 * window)
return -1
"""
)
_SETTLE = (
    _ADVANCE
    + """
local amount = redis.call('HGET', KEYS[2], ARGV[2])
if amount then
  redis.call('ZREM', KEYS[1], ARGV[2])
  redis.call('HDEL', KEYS[2], ARGV[2])
  total = total - tonumber(amount) + tonumber(ARGV[3])
  if tonumber(ARGV[3]) > 0 then redis.call('ZADD', KEYS[3], now, ARGV[2] .. ':' .. ARGV[3]) end
else
  redis.call('ZADD', KEYS[5], now, ARGV[2])
end
redis.call('SET', KEYS[4], total, 'KEEPTTL')
keep(11 * window)
return amount and 1 or 0
"""
)
_CHARGED = _ADVANCE + "keep(2 * window)\nreturn total\n"


class RedisLedger:
    """For several gateways. ``client`` is from ``redis.asyncio``; ``window_s`` is a minute, except in tests."""

    def __init__(
        self,
        client: Redis,
        lease_s: float,
        *,
        prefix: str = "slipway:tokens",
        window_s: float = WINDOW_S,
    ) -> None:
        self._reserve = client.register_script(_RESERVE)
        self._settle = client.register_script(_SETTLE)
        self._charged = client.register_script(_CHARGED)
        self._lease_ms = round(lease_s * 1000)
        self._prefix = prefix
        self._window_ms = round(window_s * 1000)

    async def reserve(self, key: str, reservation: str, amount: int, limit: int) -> Refused | None:
        """See `Ledger`."""
        arguments: list[str | int] = [self._window_ms, reservation, amount, limit, self._lease_ms]
        wait = int(await self._reserve(keys=self._keys(key), args=arguments))
        return None if wait < 0 else Refused(wait / 1000)

    async def settle(self, key: str, reservation: str, used: int) -> bool:
        """See `Ledger`."""
        return bool(await self._settle(keys=self._keys(key), args=[self._window_ms, reservation, used]))

    async def charged(self, key: str) -> int:
        """See `Ledger`."""
        return int(await self._charged(keys=self._keys(key), args=[self._window_ms]))

    def _keys(self, key: str) -> list[str]:
        """Return the names of a key's entries, all in one slot of a Redis cluster."""
        return [f"{self._prefix}:{{{key}}}:{part}" for part in ("open", "amounts", "settled", "total", "closed")]
