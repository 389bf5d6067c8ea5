"""State of one replica: whether it is healthy, and the requests it works on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import httpx

from containers.gateway.errors import CLIENT_CLOSED

log = logging.getLogger("slipway.gateway")

State = Literal["starting", "ready", "ejected"]
# Two failed checks in a row eject a replica. After five, requests waiting for its answer go to other replicas.
EJECT_AFTER, LOST_AFTER, RETURN_AFTER, ERRORS_IN_A_ROW = 2, 5, 2, 5
_LONGEST_EJECTION_S = 30.0


@dataclass(eq=False)
class Running:
    """A request that a replica works on. ``lost`` means that its task was cancelled because the replica is gone."""

    tokens: int
    task: asyncio.Task[object] | None
    lost: bool = False


@dataclass(eq=False)
class Replica:
    """A server behind the gateway.

    It begins as ``starting`` and is ``ready`` after its first successful health check. It is ``ejected`` by failed
    checks, by errors in a row, or at once by a refused connection. Two successful checks bring it back, after a pause
    that doubles with each ejection by errors: a replica with good checks and bad answers must not flap.
    """

    name: str
    url: str
    release: str
    parallel: int
    changed: Callable[[], None] = lambda: None
    state: State = "starting"
    draining: bool = False
    running: set[Running] = field(default_factory=set)
    tokens: int = 0
    turn: int = 0
    ejections: int = 0
    _bad_checks: int = 0
    _good_checks: int = 0
    _errors: int = 0
    _pause_s: float = 0.5
    _not_before: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether new requests may go there."""
        return self.state == "ready" and not self.draining

    @property
    def free(self) -> bool:
        """Whether it can take another request."""
        return self.usable and len(self.running) < self.parallel

    def begin(self, tokens: int, task: asyncio.Task[object] | None) -> Running:
        """Add a request; ``task`` is cancelled if this replica disappears."""
        running = Running(tokens, task)
        self.running.add(running)
        self.tokens += tokens
        return running

    def end(self, running: Running) -> None:
        """Remove a request; calling it again has no effect."""
        if running in self.running:
            self.running.remove(running)
            self.tokens -= running.tokens
            self.changed()

    def checked(self, *, healthy: bool) -> None:
        """Record the result of a health check."""
        if healthy:
            self._bad_checks = 0
            self._good_checks += 1
            enough = self.state == "starting" or self._good_checks >= RETURN_AFTER
            if self.state != "ready" and enough and time.monotonic() >= self._not_before:
                self._become("ready")
            return
        self._good_checks = 0
        self._bad_checks += 1
        if self.state == "ready" and self._bad_checks >= EJECT_AFTER:
            self.eject("its health checks fail")
        if self._bad_checks == LOST_AFTER:
            self._give_up_requests()

    def refused(self) -> None:
        """Record a refused connection: the replica is ejected at once."""
        self._good_checks = 0
        if self.state == "ready":
            self.eject("it refuses connections")

    def answered(self, status: int) -> None:
        """Record the status of an answer; 0 is a broken connection. Errors in a row eject the replica."""
        if 0 < status < 500 or status == CLIENT_CLOSED:
            self._errors = 0
            self._pause_s = 0.5
            return
        self._errors += 1
        if self.state == "ready" and self._errors >= ERRORS_IN_A_ROW:
            self._not_before = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_EJECTION_S)
            self.eject(f"{self._errors} errors in a row")

    def eject(self, why: str) -> None:
        """Send the replica no more requests until it is healthy again."""
        self.ejections += 1
        self._good_checks = 0
        self._errors = 0
        log.warning("replica %s is ejected: %s", self.name, why)
        self._become("ejected")

    def _become(self, state: State) -> None:
        if state == "ready":
            log.info("replica %s is ready", self.name)
        self.state = state
        self.changed()

    def _give_up_requests(self) -> None:
        """Cancel requests whose answer will not come: a host that disappears does not close its connections."""
        for running in list(self.running):
            if running.task is not None and not running.lost:
                running.lost = True
                running.task.cancel()


async def watch(replica: Replica, client: httpx.AsyncClient, interval_s: float, timeout_s: float) -> None:
    """Check a replica's health until cancelled."""
    while True:
        try:
            answer = await client.get(f"{replica.url}/health", timeout=timeout_s)
            replica.checked(healthy=answer.status_code == httpx.codes.OK)
        except (httpx.HTTPError, OSError):
            replica.checked(healthy=False)
        await asyncio.sleep(interval_s)
