"""The cores of this machine as a pool: each server of a CPU runtime is given its own by number.

vLLM's own choice (``VLLM_CPU_OMP_THREADS_BIND=auto``) is made by each server alone: it leaves one core out and takes
the same ones as every other server. Here a server holds a lock for each of its cores, which all homes of this machine
share and which the kernel drops however the process ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from containers.hardware.machine_locks import locked, try_lock
from registry.progress import Progress

_ASSIGNING = "slipway-assign-cores.lock"
# How many servers may share one core; the next one waits for none of them and takes all cores.
_MOST_ON_A_CORE = 16
# The load generator and the engine's own processes that compute nothing need a core beside the threads that compute,
# which never sleep: even of two cores one is better left to them (docs/explanation/hardware.md has the measurement).
_CLIENT_CORES = 1
_TOPOLOGY = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Cores:
    """Logical CPUs by number, and whether another server has some of them too."""

    numbers: tuple[int, ...]
    shared: bool = False

    @property
    def cpuset(self) -> str:
        """The numbers as Docker's ``cpuset`` and vLLM's binding take them: ``0,1``."""
        return ",".join(map(str, self.numbers))


@dataclass(frozen=True)
class CoreRequest:
    """What a server wants: ``count`` cores or all, but for what a load generator beside it needs (``with_client``).

    ``locks`` is the machine's folder of locks.
    """

    locks: Path
    count: int | None = None
    with_client: bool = False

    def of(self, available: int) -> int:
        """How many of so many cores."""
        rest = max(1, available - _CLIENT_CORES) if self.with_client else available
        return rest if self.count is None else min(self.count, rest)


@contextlib.contextmanager
def reserved(request: CoreRequest, progress: Progress, available: Sequence[int] | None = None) -> Iterator[Cores]:
    """Give a server its cores for the time of the block: those that no other server has, as many as it wants.

    Where fewer are free it gets those; where none is free it shares those that the fewest servers have, which
    ``progress`` is told. ``available`` are the cores that this process may use.
    """
    pool = neighbours_together(os.sched_getaffinity(0)) if available is None else list(available)
    wanted = request.of(len(pool))
    with contextlib.ExitStack() as held:
        with locked(request.locks, _ASSIGNING):
            taken, level = _take(request.locks, pool, wanted, held)
        if level:
            progress(f"warning: every core has a server already: sharing {', '.join(map(str, taken))}")
        elif len(taken) < wanted:
            progress(f"{len(taken)} of {wanted} cores for this server: other servers have the rest")
        yield Cores(tuple(sorted(taken)), shared=level > 0)


def _take(locks: Path, pool: Sequence[int], wanted: int, held: contextlib.ExitStack) -> tuple[list[int], int]:
    """Lock up to ``wanted`` cores that equally few servers have; return them and by how many each was held before.

    A core's servers hold its levels in no order: who had the first may have ended before who has the second.
    """
    free = {core: [level for level in range(_MOST_ON_A_CORE) if _is_free(locks, core, level)] for core in pool}
    most = max(map(len, free.values()))
    if not most:
        return list(pool), _MOST_ON_A_CORE
    taken = [core for core in pool if len(free[core]) == most][:wanted]
    for core in taken:
        lock = try_lock(locks, _name(core, free[core][0]))
        if lock is not None:
            held.callback(os.close, lock)
    return taken, _MOST_ON_A_CORE - most


def _is_free(locks: Path, core: int, level: int) -> bool:
    """Whether no server holds this level of a core; a lock that nobody ever made is not made for the question."""
    if not os.path.lexists(locks / _name(core, level)):
        return True
    lock = try_lock(locks, _name(core, level))
    if lock is None:
        return False
    os.close(lock)
    return True


def _name(core: int, level: int) -> str:
    return f"slipway-core-{core}-{level}.lock"


def neighbours_together(cores: set[int], topology: Path = _TOPOLOGY) -> list[int]:
    """Order logical CPUs by socket and physical core: servers get whole physical cores where numbers allow it."""

    def place(core: int) -> tuple[int, int, int]:
        folder = topology / f"cpu{core}" / "topology"
        return _number(folder / "physical_package_id"), _number(folder / "core_id"), core

    return sorted(cores, key=place)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
