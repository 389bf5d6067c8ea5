"""A pool of this machine's cores: each CPU server gets its own cores by number, and each of its ranks some of them.

With vLLM's own choice (``VLLM_CPU_OMP_THREADS_BIND=auto``) every server takes the same cores, and a model that is
divided among several ranks needs a NUMA node for each. Here a server holds a lock for each of its cores. All homes of
this machine share the locks, and the kernel drops them when the process ends.
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
# The most servers that share one core; one more takes all cores without waiting.
_MOST_ON_A_CORE = 16
# The load generator and the engine's other processes need a core besides the compute threads, which never sleep; also
# with two cores (docs/explanation/hardware.md has the measurement).
_CLIENT_CORES = 1
_TOPOLOGY = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Cores:
    """Logical CPUs by number, whether another server uses some of them too, and those of each of several ranks."""

    numbers: tuple[int, ...]
    shared: bool = False
    ranks: tuple[tuple[int, ...], ...] = ()

    @property
    def cpuset(self) -> str:
        """The numbers in the format of Docker's ``cpuset``: ``0,1``."""
        return _listed(self.numbers)

    @property
    def binding(self) -> str:
        """Each rank's numbers in the format of vLLM's ``VLLM_CPU_OMP_THREADS_BIND``: ``0,1|2,3``."""
        return "|".join(map(_listed, self.ranks or (self.numbers,)))


@dataclass(frozen=True)
class CoreRequest:
    """A server's request: ``count`` cores or all; ``with_client`` leaves a core to the load generator.

    ``locks`` is the machine's folder of locks. The cores are divided evenly among the engine's ``ranks``, each of which
    gets at least one.
    """

    locks: Path
    count: int | None = None
    with_client: bool = False
    ranks: int = 1

    def of(self, available: int) -> int:
        """Return the number of cores to take of ``available``: a multiple of the ranks, or all if they are too few."""
        rest = available - _CLIENT_CORES if self.with_client else available
        wanted = rest if self.count is None else min(self.count, rest)
        return min(available, max(self.ranks, wanted - wanted % self.ranks))


@contextlib.contextmanager
def reserved(request: CoreRequest, progress: Progress, available: Sequence[int] | None = None) -> Iterator[Cores]:
    """Reserve cores for a server during the block: as many as requested of those that no other server has.

    If fewer are free, it gets those. If none is free, it shares the cores with the fewest servers, with a warning to
    ``progress``. ``available`` are the cores that this process may use.
    """
    pool = neighbours_together(os.sched_getaffinity(0)) if available is None else list(available)
    wanted = request.of(len(pool))
    with contextlib.ExitStack() as held:
        with locked(request.locks, _ASSIGNING):
            taken, shared = _take(request.locks, pool, wanted, request.ranks, held)
        if shared:
            progress(f"warning: other servers use every core: sharing {_listed(shared, ', ')}")
        elif len(taken) < wanted:
            progress(f"this server gets {len(taken)} of {wanted} cores: other servers use the rest")
        yield Cores(tuple(sorted(taken)), bool(shared), _divided(taken, request.ranks))


def _divided(cores: Sequence[int], ranks: int) -> tuple[tuple[int, ...], ...]:
    """Divide cores among several ranks, neighbours together; ranks share cores if they are more than the cores."""
    if ranks == 1:
        return ()
    each = len(cores) // ranks
    if not each:
        return tuple((cores[rank % len(cores)],) for rank in range(ranks))
    return tuple(tuple(sorted(cores[rank * each : (rank + 1) * each])) for rank in range(ranks))


def _take(
    locks: Path, pool: Sequence[int], wanted: int, ranks: int, held: contextlib.ExitStack
) -> tuple[list[int], list[int]]:
    """Lock up to ``wanted`` of the cores with the fewest servers; return them, and those that other servers use too.

    If these are fewer than the ``ranks``, the ones with the next fewest servers are added. A core has one lock file per
    level, and its servers hold any of them: the holder of a lower level may end first.
    """
    free = {core: [level for level in range(_MOST_ON_A_CORE) if _is_free(locks, core, level)] for core in pool}
    most = max(map(len, free.values()))
    if not most:
        return list(pool), list(pool)
    emptiest = sorted(pool, key=lambda core: -len(free[core]))
    equal = sum(len(free[core]) == most for core in pool)
    taken = emptiest[: min(wanted, max(equal, ranks))]
    for core in taken:
        lock = try_lock(locks, _name(core, free[core][0])) if free[core] else None
        if lock is not None:
            held.callback(os.close, lock)
    return taken, [core for core in taken if len(free[core]) < _MOST_ON_A_CORE]


def _is_free(locks: Path, core: int, level: int) -> bool:
    """Return whether no server holds this level of a core, without creating its lock file."""
    if not os.path.lexists(locks / _name(core, level)):
        return True
    lock = try_lock(locks, _name(core, level))
    if lock is None:
        return False
    os.close(lock)
    return True


def _listed(numbers: Sequence[int], separator: str = ",") -> str:
    return separator.join(map(str, numbers))


def _name(core: int, level: int) -> str:
    return f"slipway-core-{core}-{level}.lock"


def neighbours_together(cores: set[int], topology: Path = _TOPOLOGY) -> list[int]:
    """Order logical CPUs by socket and physical core, so that servers get whole physical cores if possible."""

    def place(core: int) -> tuple[int, int, int]:
        folder = topology / f"cpu{core}" / "topology"
        return _number(folder / "physical_package_id"), _number(folder / "core_id"), core

    return sorted(cores, key=place)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
