"""Selection of a request's replica: exact canary shares, then the fewest outstanding tokens; a bounded queue."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from containers.gateway.config import Backend, GatewaySettings, ModelRoute, Routes
from containers.gateway.errors import Refusal
from containers.gateway.replicas import Replica, Running, watch
from containers.gateway.tokens import PromptCounter

log = logging.getLogger("slipway.gateway")


@dataclass(frozen=True, eq=False)
class Lease:
    """A slot at a replica; return it with `release`."""

    replica: Replica
    running: Running

    def release(self) -> None:
        """Return the slot; calling it again has no effect."""
        self.replica.end(self.running)


@dataclass(eq=False)
class _Share:
    """A release's share of the traffic; ``credit`` is its state in the weighted round robin."""

    release: str
    weight: int
    replicas: list[Replica]
    credit: int = 0


@dataclass(eq=False)
class _Waiting:
    tokens: int
    tried: Collection[Replica]
    task: asyncio.Task[object] | None
    place: asyncio.Future[Lease]


class Pool:
    """A model's replicas, and the queue of requests that wait for one."""

    def __init__(self, route: ModelRoute, counter: PromptCounter) -> None:
        self.route = route
        self.counter = counter
        self.shares: list[_Share] = []
        self.waiting: deque[_Waiting] = deque()
        self._turns = itertools.count(1)

    def served_as(self, name: str) -> str:
        """The name inside the engine of the model, or of an adapter that is served next to it."""
        return name if name in self.route.adapters else self.route.served_as

    def replicas(self) -> Iterator[Replica]:
        """All replicas in the routes."""
        for share in self.shares:
            yield from share.replicas

    async def place(self, tokens: int, tried: Collection[Replica], size: int, timeout_s: float) -> Lease:
        """Wait for a free replica, first come, first served. Those in ``tried`` are used only if no other is healthy.

        Raises:
            Refusal: 503 if the queue is full, or after the timeout.
        """
        task = asyncio.current_task()
        replica = None if self.waiting else self._choose(tried)
        if replica is not None:
            return Lease(replica, replica.begin(tokens, task))
        if len(self.waiting) >= size:
            raise Refusal(503, "queue_full", "all replicas are busy and the queue is full", retry_after=1)
        entry = _Waiting(tokens, tried, task, asyncio.get_running_loop().create_future())
        self.waiting.append(entry)
        try:
            async with asyncio.timeout(timeout_s):
                return await entry.place
        except BaseException as error:  # a client that disconnects cancels the wait: its slot must be free again
            if entry.place.done() and not entry.place.cancelled():
                entry.place.result().release()  # the slot was assigned just after the timeout
            if isinstance(error, TimeoutError):
                word = "busy" if any(replica.usable for replica in self.replicas()) else "away"
                message = f"all replicas are {word}: waited {timeout_s:g} s for one"
                raise Refusal(503, "queue_timeout", message, retry_after=1) from None
            raise
        finally:
            if entry in self.waiting:
                self.waiting.remove(entry)

    def serve_queue(self) -> None:
        """Assign free slots to waiting requests."""
        while self.waiting:
            first = self.waiting[0]
            if first.place.done():
                self.waiting.popleft()
                continue
            replica = self._choose(first.tried)
            if replica is None:
                return
            self.waiting.popleft()
            first.place.set_result(Lease(replica, replica.begin(first.tokens, first.task)))

    def _choose(self, tried: Collection[Replica]) -> Replica | None:
        """Choose the release by smooth weighted round robin (as nginx does), then its least loaded replica."""
        others = any(replica.usable and replica not in tried for replica in self.replicas())
        eligible = []
        for share in self.shares:
            free = [replica for replica in share.replicas if replica.free and not (others and replica in tried)]
            if free:
                eligible.append((share, free))
        if any(share.weight for share, _ in eligible):
            eligible = [(share, free) for share, free in eligible if share.weight]
        if not eligible:
            return None
        for share, _ in eligible:
            share.credit += share.weight
        chosen, free = max(eligible, key=lambda item: item[0].credit)
        chosen.credit -= sum(share.weight for share, _ in eligible)
        replica = min(free, key=lambda each: (each.tokens, len(each.running), each.turn))
        replica.turn = next(self._turns)
        return replica


class Router:
    """The pools of all models in the routes. Replicas removed from the routes finish their running requests."""

    def __init__(self, settings: GatewaySettings, client: httpx.AsyncClient) -> None:
        self._settings = settings
        self._client = client
        self.pools: dict[str, Pool] = {}
        self.leaving: list[Replica] = []
        self._watches: dict[Replica, asyncio.Task[None]] = {}
        self._counters: dict[Path, PromptCounter] = {}

    async def apply(self, routes: Routes) -> None:
        """Apply new routes atomically.

        Raises:
            ConfigurationError: A tokenizer can't be read. The current routes stay in use.
        """
        counters: dict[Path, PromptCounter] = {}
        for folder in {route.tokenizer for route in routes.models.values()}:
            known = self._counters.get(folder)
            counters[folder] = await asyncio.to_thread(PromptCounter, folder) if known is None else known
        self._counters = counters
        present = {(replica.name, replica.url): replica for replica in self._watches}
        wanted: set[Replica] = set()
        for name, route in routes.models.items():
            pool = self.pools.setdefault(name, Pool(route, counters[route.tokenizer]))
            pool.route, pool.counter = route, counters[route.tokenizer]
            credits_before = {share.release: share.credit for share in pool.shares}
            pool.shares = [
                _Share(
                    backend.release,
                    backend.weight,
                    self._replicas(backend, route, pool, present),
                    credits_before.get(backend.release, 0),
                )
                for backend in route.backends
            ]
            wanted.update(pool.replicas())
            pool.serve_queue()
        for name in self.pools.keys() - routes.models.keys():
            del self.pools[name]
        for replica in set(self._watches) - wanted - set(self.leaving):
            replica.draining = True
            self.leaving.append(replica)

    def pool(self, name: str) -> Pool | None:
        """The replicas of a model or of an adapter; None where there is none of that name."""
        return self.pools.get(name) or next((each for each in self.pools.values() if name in each.route.adapters), None)

    def names(self) -> Iterator[tuple[str, Pool]]:
        """Every model, and after it its adapters, each with its replicas."""
        for name, pool in sorted(self.pools.items()):
            yield name, pool
            for adapter in pool.route.adapters:
                yield adapter, pool

    def forget_idle(self) -> None:
        """Stop watching removed replicas that have no running requests."""
        for replica in [each for each in self.leaving if not each.running]:
            self.leaving.remove(replica)
            self._watches.pop(replica).cancel()

    @property
    def is_ready(self) -> bool:
        """Whether every model has a healthy replica."""
        return bool(self.pools) and all(
            any(replica.usable for replica in pool.replicas()) for pool in self.pools.values()
        )

    def everyone(self) -> list[Replica]:
        """Return all replicas, including removed ones that still work on requests."""
        return list(self._watches)

    def stop(self) -> None:
        """Stop all health checks."""
        for task in self._watches.values():
            task.cancel()

    def _replicas(
        self, backend: Backend, route: ModelRoute, pool: Pool, present: dict[tuple[str, str], Replica]
    ) -> list[Replica]:
        found = []
        for wanted in backend.replicas:
            replica = present.get((wanted.name, wanted.url))
            if replica is None:
                replica = Replica(wanted.name, wanted.url, backend.release, route.parallel, pool.serve_queue)
                checks = watch(replica, self._client, self._settings.health_interval_s, self._settings.health_timeout_s)
                self._watches[replica] = asyncio.ensure_future(checks)
            replica.parallel, replica.changed, replica.draining = route.parallel, pool.serve_queue, False
            if replica in self.leaving:
                self.leaving.remove(replica)
            found.append(replica)
        return found
