"""Limits of a key per minute: requests (the `limits` library's moving window) and tokens (`ledger`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import redis.asyncio
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from limits.errors import StorageError
from redis.exceptions import RedisError

from containers.gateway.errors import Refusal
from containers.gateway.keys import Key
from containers.gateway.ledger import Ledger, MemoryLedger, RedisLedger, Refused

if TYPE_CHECKING:
    from limits.aio.storage.redis.redispy import RedispyBridge
    from redis.asyncio import Redis

log = logging.getLogger("slipway.gateway")
_LEASE_SLACK_S = 30.0
_REDIS_SECONDS, _REDIS_CONNECTIONS = 2.0, 16
_SETTLE_WAIT_S, _LONGEST_PAUSE_S = 0.5, 5.0
_CLOSE_WAIT_S = 10.0
_SWEEP_EVERY_S, _CLOCK_AGE_S = 10.0, 10.0


class _Memory(MemoryStorage):
    """Requests of one gateway, by a monotonic clock. Entries that have expired are removed from time to time."""

    STORAGE_SCHEME: ClassVar[list[str]] = ["async+slipway"]  # type: ignore[misc]

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._taken: dict[str, deque[float]] = {}
        self._swept = clock()

    async def now(self) -> float:
        """Return the clock's time in seconds."""
        return self._clock()

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Take ``amount`` of ``limit`` within ``expiry`` seconds; nothing where so much is not left."""
        now = self._clock()
        if now - self._swept > _SWEEP_EVERY_S:
            self._swept = now
            for other in list(self._taken):
                self._recent(other, now, expiry)
        recent = self._recent(key, now, expiry)
        if len(recent) + amount > limit:
            return False
        recent.extend([now] * amount)
        self._taken[key] = recent
        return True

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:  # noqa: ARG002 - the library's signature
        """Return when the oldest of what counts was taken, and how much counts."""
        now = self._clock()
        recent = self._recent(key, now, expiry)
        return (recent[0], len(recent)) if recent else (now, 0)

    def _recent(self, key: str, now: float, expiry: int) -> deque[float]:
        taken = self._taken.get(key, deque())
        while taken and taken[0] <= now - expiry:
            taken.popleft()
        if not taken:
            self._taken.pop(key, None)
        return taken


class _Shared(RedisStorage):
    """Requests of several gateways, by Redis's clock. Entries in its future are removed."""

    STORAGE_SCHEME: ClassVar[list[str]] = ["async+slipway+redis"]  # type: ignore[misc]

    def __init__(self, uri: str, **options: Any) -> None:  # noqa: ANN401 - the library's
        super().__init__(uri, **options)
        self._ahead, self._asked = 0.0, -_CLOCK_AGE_S
        self._asking = asyncio.Lock()

    async def now(self) -> float:
        """Return Redis's time in seconds, read from time to time and carried forward with a monotonic clock."""
        async with self._asking:
            if time.monotonic() - self._asked > _CLOCK_AGE_S:
                seconds, microseconds = await cast("Redis", self._redis.get_connection()).time()
                self._asked = time.monotonic()
                self._ahead = float(seconds) + float(microseconds) / 1e6 - self._asked
        return time.monotonic() + self._ahead

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Take ``amount`` of ``limit`` within ``expiry`` seconds; nothing where so much is not left."""
        now, name = await self.now(), self._redis.prefixed_key(key)
        if await self._redis.lua_acquire_moving_window([name], [now, limit, expiry, amount]):
            return True
        if (await self._window(key, limit, now - expiry))[0] > now:  # the clock was set back
            await self.clear(key)
        return False

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """Return when the oldest of what counts was taken, and how much counts."""
        now = await self.now()
        return await self._window(key, limit, now - expiry)

    @property
    def _redis(self) -> RedispyBridge:
        return cast("RedispyBridge", self.bridge)

    async def _window(self, key: str, limit: int, since: float) -> tuple[float, int]:
        found = await self._redis.lua_moving_window([self._redis.prefixed_key(key)], [since, limit])
        return (float(found[0]), int(found[1])) if found else (since, 0)


@dataclass
class Grant:
    """Permission to run one request. ``used`` is the number of tokens to charge; the caller sets it."""

    reserved: int
    used: int = 0


class Limiter:
    """Grants requests within their key's limits.

    ``lease_s`` is the longest that a request may take. Reservations of a gateway that died end soon after it.
    """

    def __init__(
        self,
        ledger: Ledger,
        requests: _Memory | _Shared,
        *,
        lease_s: float,
        wrong_keys: int = 60,
        rejected: int = 120,
        close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._ledger = ledger
        self._requests, self._storage = MovingWindowRateLimiter(requests), requests
        self._lease_s = lease_s
        self._wrong_keys = RateLimitItemPerMinute(wrong_keys)
        # Not shared between gateways, because these limits protect this process.
        self._rejected = RateLimitItemPerMinute(rejected)
        self._rejections = MovingWindowRateLimiter(_Memory())
        self._close = close
        self._running: Counter[str] = Counter()
        self._settling: set[asyncio.Task[Any]] = set()

    @classmethod
    def in_memory(
        cls, *, lease_s: float, wrong_keys: int = 60, rejected: int = 120, clock: Callable[[], float] = time.monotonic
    ) -> Limiter:
        """Make the limiter of a single gateway. ``clock`` returns seconds and is monotonic."""
        lease_s += _LEASE_SLACK_S
        ledger, requests = MemoryLedger(lease_s, clock), _Memory(clock)
        return cls(ledger, requests, lease_s=lease_s, wrong_keys=wrong_keys, rejected=rejected)

    @classmethod
    def in_redis(cls, url: str, *, lease_s: float, wrong_keys: int = 60, rejected: int = 120) -> Limiter:
        """Make a limiter that shares its limits through ``url`` (``redis://``, ``rediss://``)."""
        # Few connections are enough: Redis runs one operation at a time, each in a fraction of a millisecond.
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=_REDIS_CONNECTIONS,
            timeout=_REDIS_SECONDS,
            socket_timeout=_REDIS_SECONDS,
            socket_connect_timeout=_REDIS_SECONDS,
        )
        client = redis.asyncio.Redis(connection_pool=pool)
        options: dict[str, Any] = {"connection_pool": pool}  # the library's types have no room for a pool
        storage = _Shared(
            f"async+{url}", wrap_exceptions=True, implementation="redispy", key_prefix="slipway:requests", **options
        )
        lease_s += _LEASE_SLACK_S
        return cls(
            RedisLedger(client, lease_s),
            storage,
            lease_s=lease_s,
            wrong_keys=wrong_keys,
            rejected=rejected,
            close=pool.aclose,
        )

    @contextlib.asynccontextmanager
    async def grant(self, key: Key, tokens: int) -> AsyncIterator[Grant]:
        """Reserve ``tokens`` (prompt and longest answer) for one request, and settle what it ``used`` after the block.

        It is settled on any exit, including cancellation. A refused request uses nothing.

        Raises:
            Refusal: 429 with the seconds to wait; 400 if the request exceeds the whole limit; 503 if the shared store
                does not answer.
        """
        limits = key.limits
        self._refuse_parallel(key)
        if limits.tokens_per_minute is not None and tokens > limits.tokens_per_minute:
            raise Refusal(
                400, "request_too_large",
                f"this request may take {tokens} tokens (prompt and longest answer); your key has "
                f"{limits.tokens_per_minute} a minute: shorten the prompt or lower `max_tokens`",
            )  # fmt: skip
        self._running[key.id] += 1
        grant, reservation = Grant(tokens), secrets.token_hex(12)
        try:
            async with self._reserved(key, reservation, grant):
                yield grant
        finally:
            self._running[key.id] -= 1
            if not self._running[key.id]:
                del self._running[key.id]

    async def refuse_early(self, key: Key) -> None:
        """Raise the ``Refusal`` that `grant` would raise for the number of requests, without counting this one.

        Too many invalid requests are also answered with 429: each costs work, and no other limit counts them.
        """
        if not await self._rejections.test(self._rejected, key.id):
            message = f"{self._rejected.amount} requests of your key were wrong within a minute: correct them first"
            raise Refusal(429, "too_many_rejected", message, retry_after=60)
        self._refuse_parallel(key)
        await self._count(key, self._requests.test)

    async def count_rejected(self, key: Key) -> None:
        """Count an invalid request."""
        await self._rejections.hit(self._rejected, key.id)

    async def refuse_guessing(self, address: str) -> None:
        """Count a failed authentication; ``Refusal`` 429 after too many from one address within a minute."""
        with _store():
            allowed = await self._requests.hit(self._wrong_keys, "wrong-keys", address)
        if not allowed:
            raise Refusal(429, "too_many_wrong_keys", "too many wrong API keys from your address", retry_after=60)

    async def close(self) -> None:
        """Settle finished requests, as far as the store answers, and disconnect."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.settled(), _CLOSE_WAIT_S)
        if self._close is not None:
            await self._close()

    async def settled(self) -> None:
        """Wait until all finished requests are settled."""
        while self._settling:
            await asyncio.gather(*self._settling, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def _reserved(self, key: Key, reservation: str, grant: Grant) -> AsyncIterator[None]:
        """Reserve tokens, then count the request, so that a refusal for tokens does not use up a request."""
        limit = key.limits.tokens_per_minute
        if limit is None:
            await self._count(key, self._requests.hit)
            yield
            return
        # A separate task: a client that disconnects meanwhile must not leave a reservation that is never settled.
        reserving = asyncio.ensure_future(self._ledger.reserve(key.id, reservation, grant.reserved, limit))
        try:
            with _store():
                refused = await asyncio.shield(reserving)
            if refused is not None:
                message = f"your key has {limit} tokens a minute, which are used or reserved"
                raise Refusal(429, "token_limit", message, retry_after=refused.wait_s)
            await self._count(key, self._requests.hit)
            yield
        finally:
            task = asyncio.ensure_future(self._settle(reserving, key.id, reservation, grant.used))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)
            # Settled before the answer ends, so that the client's next request counts correctly. The wait is short if
            # the store is down.
            await asyncio.wait([task], timeout=_SETTLE_WAIT_S)

    def _refuse_parallel(self, key: Key) -> None:
        most = key.limits.parallel
        if most is not None and self._running[key.id] >= most:
            raise Refusal(429, "parallel_limit", f"your key has {most} requests at a time", retry_after=1)

    async def _count(self, key: Key, take: Callable[[RateLimitItem, str], Awaitable[bool]]) -> None:
        if key.limits.requests_per_minute is None:
            return
        item = RateLimitItemPerMinute(key.limits.requests_per_minute)
        with _store():
            if await take(item, key.id):
                return
            reset = (await self._requests.get_window_stats(item, key.id)).reset_time
            wait_s = max(0.0, reset - await self._storage.now())
        message = f"your key has {key.limits.requests_per_minute} requests a minute"
        raise Refusal(429, "request_limit", message, retry_after=wait_s)

    async def _settle(
        self, reserving: asyncio.Future[Refused | None], key_id: str, reservation: str, used: int
    ) -> None:
        """Settle a reservation as soon as the store answers. Retries stop when the lease has ended."""
        await asyncio.wait([reserving])
        if not reserving.cancelled() and reserving.exception() is None and reserving.result() is not None:
            return
        deadline, pause = time.monotonic() + self._lease_s, 0.1
        while time.monotonic() < deadline:
            try:
                await self._ledger.settle(key_id, reservation, used)
            except (RedisError, OSError) as error:
                log.warning("can't settle a reservation yet: %s", type(error).__name__)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                return


@contextlib.contextmanager
def _store() -> Iterator[None]:
    """Raise ``Refusal`` 503 if the shared store does not answer within the block: no request runs uncounted."""
    try:
        yield
    except (RedisError, StorageError, OSError) as error:
        log.warning("the store of limits does not answer: %s", type(error).__name__)
        raise Refusal(
            503, "limits_unavailable", "limits can't be checked at the moment: try again", retry_after=1
        ) from error
