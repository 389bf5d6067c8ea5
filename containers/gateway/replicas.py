"""One replica as the gateway sees it: is it well, and how much is it doing."""

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
# A check that fails twice ejects; five in a row, and requests that wait for this replica's answer go elsewhere.
EJECT_AFTER, LOST_AFTER, RETURN_AFTER, ERRORS_IN_A_ROW = 2, 5, 2, 5
_LONGEST_EJECTION_S = 30.0


@dataclass(eq=False)
class Running:
    """A request that a replica works on. ``lost`` says that its task was cancelled because the replica is gone."""

    tokens: int
    task: asyncio.Task[object] | None
    lost: bool = False


@dataclass(eq=False)
class Replica:
    """A server behind the gateway.

    It begins as ``starting``, is ``ready`` with its first good check, and ``ejected`` by failing checks, by a refused
    connection at once, or by errors in a row; from there two good checks bring it back, after a pause that doubles with
    every ejection by errors (a replica whose health is fine and whose answers are not must not flap).
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
        """Whether it has room for one more."""
        return self.usable and len(self.running) < self.parallel

    def begin(self, tokens: int, task: asyncio.Task[object] | None) -> Running:
        """Count a request in; ``task`` is cancelled should this replica vanish."""
        running = Running(tokens, task)
        self.running.add(running)
        self.tokens += tokens
        return running

    def end(self, running: Running) -> None:
        """Count a request out; twice is once."""
        if running in self.running:
            self.running.remove(running)
            self.tokens -= running.tokens
            self.changed()

    def checked(self, *, healthy: bool) -> None:
        """Take the result of a health check."""
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
        """A connection could not be made: it is gone, now."""
        self._good_checks = 0
        if self.state == "ready":
            self.eject("it refuses connections")

    def answered(self, status: int) -> None:
        """Take the status of an answer; 0 is a connection that broke. Errors in a row eject."""
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
        """Send no more requests there until it is well again."""
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
        """Wake those who wait for an answer that will not come: a host that vanished closes no connection."""
        for running in list(self.running):
            if running.task is not None and not running.lost:
                running.lost = True
                running.task.cancel()


async def watch(replica: Replica, client: httpx.AsyncClient, interval_s: float, timeout_s: float) -> None:
    """Check a replica's health for ever."""
    while True:
        try:
            answer = await client.get(f"{replica.url}/health", timeout=timeout_s)
            replica.checked(healthy=answer.status_code == httpx.codes.OK)
        except (httpx.HTTPError, OSError):
            replica.checked(healthy=False)
        await asyncio.sleep(interval_s)
