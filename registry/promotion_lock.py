"""A lock per release line, held by one promoter at a time; it needs nothing but MLflow.

MLflow moves an alias atomically but has no compare-and-swap: the last writer wins. The number of a new model version is
both atomic and unique, because the database's primary key gives it to one caller only. So the lock is a ticket lock:
each promoter creates a version of the registered model ``slipway-turns.NAME`` (its *ticket*), and the lowest number
that exists holds the lock. Deleting the ticket releases the lock. MLflow gives no number twice.

A dead process must not hold the lock for ever. A ticket names the process that made it, so a promoter on the same
machine sees at once that the process is gone. For other machines, a live process changes its ticket every few seconds;
a promoter that sees a ticket unchanged for `LEASE_SECONDS`, by its own clock, deletes it. Clocks of two machines are
never compared.

Law: between two promoters that reach a store by the same address, alias moves never interleave, as long as no promoter
stalls for more than `LEASE_SECONDS` between `PromotionLock.check`, which comes before every write, and that write. A
promoter that stalled longer finds its ticket gone and stops; the journal then holds what it had begun, and the next
promoter finishes that first (`registry.journal`). In every case an alias names a whole, verified release, because
nothing else is ever written.

For an SQLite file a file lock is enough, which the kernel releases when its process ends. The same law holds, without
the lease.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from registry.backend import LOCK_PREFIX, RegistryBackend, Version
from registry.connect import open_backend
from registry.errors import PromotionError, RefusedError, RegistryError, TrackingError
from registry.file_locks import locked
from registry.progress import Progress
from registry.tracking import database_path

LEASE_SECONDS = 60.0
_BEAT_SECONDS = 10.0
_PAUSES = (0.1, 1.0)  # seconds between two looks at the queue
_MAKER, _BEAT = "slipway.maker", "slipway.beat"
_NOWHERE = "slipway:/turn"  # a version must have a source; MLflow opens none under a scheme that it does not know


class PromotionLock:
    """The lock of a release line; `check` it before each write."""

    def check(self) -> None:
        """Raise ``PromotionError`` if the lock was lost."""


@contextmanager
def hold_promotion_lock(tracking_uri: str, name: str, progress: Progress) -> Iterator[PromotionLock]:
    """Wait for the lock of the release line ``name``, and hold it.

    Raises:
        TrackingError: MLflow can't be reached, or does not permit promotions.
    """
    path = database_path(tracking_uri)
    if path is not None:
        with _file_lock(path, progress):
            yield PromotionLock()
        return
    with open_backend(tracking_uri) as backend:
        ticket = _Ticket.take(backend, f"{LOCK_PREFIX}{name}")
        try:
            with ticket.renewed(tracking_uri):
                ticket.wait(progress)
                yield ticket
        finally:
            ticket.release()


@contextmanager
def _file_lock(database: Path, progress: Progress) -> Iterator[None]:
    lock = database.with_name(database.name + ".promotion.lock")
    with ExitStack() as held:
        try:
            database.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(lock, lambda: progress("waiting for another promotion to end")))
        except OSError as error:
            raise TrackingError(f"can't promote: `{error.filename}`: {error.strerror}") from error
        yield


@dataclass
class _Ticket(PromotionLock):
    """A ticket: a version of the registered model ``line``, whose name begins with `LOCK_PREFIX`."""

    backend: RegistryBackend
    line: str
    number: str
    _seen: dict[str, tuple[str, float]] = field(default_factory=dict)

    @classmethod
    def take(cls, backend: RegistryBackend, line: str) -> _Ticket:
        """Create a version; try again if MLflow fails because many are created at once."""
        backend.create_line(line, {"slipway.kind": "turns"})
        nonce = uuid.uuid4().hex
        for attempt in range(1, 40):
            try:
                return cls(backend, line, backend.create_version(line, _NOWHERE, {_MAKER: _this_process(nonce)}))
            except RefusedError:
                raise
            except TrackingError:
                # The version may exist although the answer was lost; left behind, it would block the queue.
                mine = [one for one in backend.versions(line) if nonce in one.tags.get(_MAKER, "")]
                if mine:
                    return cls(backend, line, mine[0].version)
                if attempt == 39:
                    raise
                time.sleep(random.uniform(0.02, 0.1 * min(attempt, 10)))  # noqa: S311 - spreads those who collided
        raise AssertionError("unreachable: the last attempt returns or raises")

    def wait(self, progress: Progress) -> None:
        """Return when every ticket with a lower number is released, or its process is dead."""
        reported = False
        while True:
            queue = sorted(self.backend.versions(self.line), key=lambda one: int(one.version))
            if not any(one.version == self.number for one in queue):
                raise PromotionError("not promoted: another promoter took this one for dead; run the command again")
            first = queue[0]
            if first.version == self.number:
                return
            if self._is_dead(first):
                self.backend.delete_version(self.line, first.version)
                continue
            if not reported:
                progress(f"waiting for {len(queue) - 1} other promotion(s) to end")
                reported = True
            ahead = sum(1 for one in queue if int(one.version) < int(self.number))
            time.sleep(random.uniform(*_PAUSES) * min(ahead, 5))  # noqa: S311 - spreads those who wait

    def check(self) -> None:
        """Raise ``PromotionError`` if the ticket is gone."""
        if not any(one.version == self.number for one in self.backend.versions(self.line)):
            raise PromotionError(
                f"the promotion lock was lost: this promotion did not renew it for {LEASE_SECONDS:.0f} seconds;"
                " run the command again"
            )

    def release(self) -> None:
        """Delete the ticket; if that fails, other promoters find its process gone or silent."""
        with suppress(RegistryError):
            self.backend.delete_version(self.line, self.number)

    @contextmanager
    def renewed(self, tracking_uri: str) -> Iterator[None]:
        """Renew the ticket every few seconds in a thread, over a connection of its own."""
        ended = threading.Event()

        def beat() -> None:
            with suppress(RegistryError), open_backend(tracking_uri) as backend:
                while not ended.wait(_BEAT_SECONDS):
                    with suppress(RegistryError):
                        backend.set_version_tag(self.line, self.number, _BEAT, uuid.uuid4().hex)

        thread = threading.Thread(target=beat, name="promotion-lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _is_dead(self, other: Version) -> bool:
        if _has_ended(other.tags.get(_MAKER, "")):
            return True
        state, now = other.tags.get(_BEAT, ""), time.monotonic()
        before, since = self._seen.get(other.version, ("", now))
        if other.version not in self._seen or before != state:
            self._seen[other.version] = (state, now)
            return False
        return now - since > LEASE_SECONDS


def _this_process(nonce: str) -> str:
    pid = os.getpid()
    return json.dumps({"machine": _machine(), "pid": pid, "started": _started(pid), "nonce": nonce})


def _has_ended(maker: str) -> bool:
    """Whether a process of this machine and PID namespace has ended; False if that can't be told."""
    try:
        process = json.loads(maker)
        return bool(process["machine"] == _machine() and _started(int(process["pid"])) != process["started"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _machine() -> str:
    """Identify this boot of this machine and its PID namespace: a PID means nothing in another."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return uuid.uuid4().hex  # equal to no other: the lease decides


def _started(pid: int) -> str:
    """Return when the process started, in clock ticks since boot; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
