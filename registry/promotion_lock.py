"""One promoter of a release line at a time, with nothing but what MLflow has.

MLflow moves an alias atomically and knows no compare-and-swap: the last writer wins. What it has that is atomic *and*
unique is the number of a new model version, which its database's primary key hands to one caller alone. So promoters
queue as at a counter: each creates a version of the registered model ``slipway-turns.NAME`` (its *ticket*), and it is
the turn of whoever holds the lowest number that is left. A ticket is handed in by deleting it; MLflow gives no number
twice.

A ticket whose maker died must not stop the queue. It says which process made it, and a promoter on the same machine
sees at once that this is gone. For all others a live maker changes its ticket every few seconds, and one that was seen
unchanged for `LEASE_SECONDS`, by the observer's own clock, is deleted. No two machines' clocks are compared.

The law: between two promoters that reach a store by the same address, alias moves never interleave, so long as no
promoter stalls for longer than `LEASE_SECONDS` between looking that its ticket still stands (`Turn.check`, before every
write) and that write. Whoever stalls longer finds its ticket gone, and stops; the journal then holds what it had begun,
and the next promoter finishes that first (`registry.journal`). Whatever happens, an alias names a whole, verified
release: nothing else is ever written.

Beside an SQLite file a lock on a file is enough, and the kernel drops it with its process: that is the same law without
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

from registry.backend import TURNS, Backend, Version
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


class Turn:
    """The right to move a line's aliases; `check` it before each write."""

    def check(self) -> None:
        """Raise ``PromotionError`` where the turn was lost."""


@contextmanager
def turn(tracking_uri: str, name: str, progress: Progress) -> Iterator[Turn]:
    """Wait for one's turn to promote in the release line ``name``, and hold it meanwhile.

    Raises:
        TrackingError: MLflow can't be reached, or does not let one promote.
    """
    path = database_path(tracking_uri)
    if path is not None:
        with _file_lock(path, progress):
            yield Turn()
        return
    with open_backend(tracking_uri) as backend:
        ticket = _Ticket.take(backend, f"{TURNS}{name}")
        try:
            with ticket.alive(tracking_uri):
                ticket.wait(progress)
                yield ticket
        finally:
            ticket.hand_in()


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
class _Ticket(Turn):
    """A place in the queue ``line``."""

    backend: Backend
    line: str
    number: str
    _seen: dict[str, tuple[str, float]] = field(default_factory=dict)

    @classmethod
    def take(cls, backend: Backend, line: str) -> _Ticket:
        """Create a version; where many do so at once MLflow may give up on one, which then tries again."""
        backend.create_line(line, {"slipway.kind": "turns"})
        nonce = uuid.uuid4().hex
        for attempt in range(1, 40):
            try:
                return cls(backend, line, backend.create_version(line, _NOWHERE, {_MAKER: _this_process(nonce)}))
            except RefusedError:
                raise
            except TrackingError:
                # It may be there none the less, its answer lost: a ticket that nobody knows of stops the queue.
                mine = [one for one in backend.versions(line) if nonce in one.tags.get(_MAKER, "")]
                if mine:
                    return cls(backend, line, mine[0].version)
                if attempt == 39:
                    raise
                time.sleep(random.uniform(0.02, 0.1 * min(attempt, 10)))  # noqa: S311 - spreads those who collided
        raise AssertionError("unreachable: the last attempt returns or raises")

    def wait(self, progress: Progress) -> None:
        """Return when every ticket with a lower number is handed in, or its maker dead."""
        told = False
        while True:
            queue = sorted(self.backend.versions(self.line), key=lambda one: int(one.version))
            if not any(one.version == self.number for one in queue):
                raise PromotionError(
                    "not promoted: another promoter took this one for dead; run the same command again"
                )
            first = queue[0]
            if first.version == self.number:
                return
            if self._is_dead(first):
                self.backend.delete_version(self.line, first.version)
                continue
            if not told:
                progress(f"waiting for {len(queue) - 1} other promotion(s) to end")
                told = True
            ahead = sum(1 for one in queue if int(one.version) < int(self.number))
            time.sleep(random.uniform(*_PAUSES) * min(ahead, 5))  # noqa: S311 - spreads those who wait

    def check(self) -> None:
        """Raise ``PromotionError`` where the ticket is gone."""
        if not any(one.version == self.number for one in self.backend.versions(self.line)):
            raise PromotionError(
                f"the turn to promote was lost: nothing was heard of this promotion for {LEASE_SECONDS:.0f} seconds;"
                " run the same command again"
            )

    def hand_in(self) -> None:
        """Delete the ticket; where that fails, the others find its maker gone or silent."""
        with suppress(RegistryError):
            self.backend.delete_version(self.line, self.number)

    @contextmanager
    def alive(self, tracking_uri: str) -> Iterator[None]:
        """Change the ticket every few seconds meanwhile, over a connection of its own."""
        ended = threading.Event()

        def beat() -> None:
            with suppress(RegistryError), open_backend(tracking_uri) as backend:
                while not ended.wait(_BEAT_SECONDS):
                    with suppress(RegistryError):
                        backend.set_version_tag(self.line, self.number, _BEAT, uuid.uuid4().hex)

        thread = threading.Thread(target=beat, name="turn", daemon=True)
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
    """Whether a process of this machine, in this namespace of processes, is gone; False where one can't tell."""
    try:
        told = json.loads(maker)
        return bool(told["machine"] == _machine() and _started(int(told["pid"])) != told["started"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _machine() -> str:
    """Name this boot of this machine and this namespace of process numbers, between which numbers mean nothing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return uuid.uuid4().hex  # nobody else is here: a lease decides


def _started(pid: int) -> str:
    """When the process was started, in clock ticks since boot; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
