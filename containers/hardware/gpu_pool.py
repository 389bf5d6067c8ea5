"""A pool of this machine's GPUs: each container reserves as many as its model is divided among.

A reservation is a lock for each GPU, by UUID, in the machine's folder of locks, so that two homes never measure on one
device. One process chooses at a time, and takes all that it needs or none, so that two never wait for each other. The
kernel drops a reservation when its process ends.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from containers.errors import ContainerError
from containers.hardware import gpu as hardware
from containers.hardware.gpu import Gpu
from containers.hardware.machine_locks import locked, try_lock
from registry.progress import Progress

_ASSIGNING = "slipway-assign-gpus.lock"
_POLL_SECONDS = 1.0


class GpuPoolError(ContainerError):
    """So many GPUs can't be reserved; the message says what there is."""


@contextlib.contextmanager
def reserved(count: int, progress: Progress, locks: Path, *, wait: bool = True) -> Iterator[tuple[Gpu, ...]]:
    """Reserve ``count`` GPUs during the block; none on a machine without GPUs.

    Of those that are neither reserved nor used by other programs it takes the group with the most NVLink connections,
    then the one with the most free memory. If there are too few it waits, or raises an error unless ``wait``.

    Raises:
        GpuPoolError: the machine has fewer GPUs, or one has disappeared.
        MachineLockError: a lock can't be opened.
    """
    found = hardware.gpus() if count else []
    if not found:
        yield ()
        return
    wanted = "one GPU" if count == 1 else f"{count} GPUs"
    told = False
    with contextlib.ExitStack() as held:
        while True:
            if len(found) < count:
                raise GpuPoolError(f"{wanted} needed, and this machine has {len(found)}")
            with locked(locks, _ASSIGNING):
                chosen, taken = _take(count, found, locks, held)
            if chosen:
                break
            if not wait:
                raise GpuPoolError(f"{wanted} needed, and of {len(found)} {', '.join(taken)}")
            if not told:
                progress(f"waiting for {wanted}: of {len(found)} {', '.join(taken)}")
                told = True
            time.sleep(_POLL_SECONDS)
            if lost := hardware.disappeared([gpu.uuid for gpu in found]):
                raise GpuPoolError(lost)
        yield chosen


def _take(
    count: int, found: Sequence[Gpu], locks: Path, held: contextlib.ExitStack
) -> tuple[tuple[Gpu, ...], list[str]]:
    """Lock the best group of free GPUs in ``held``; return it, empty if too few are free, and what the others do."""
    descriptors: dict[Gpu, int] = {}
    taken = []
    try:
        for gpu in found:
            lock = try_lock(locks, f"slipway-gpu-{gpu.uuid}.lock")
            if lock is None:
                taken.append(f"{gpu.uuid} is reserved")
                continue
            descriptors[gpu] = lock
        busy = [gpu for gpu in descriptors if hardware.is_busy(gpu)]
        taken += [f"{gpu.uuid} is used by another program" for gpu in busy]
        free = [gpu for gpu in descriptors if gpu not in busy]
        chosen = _best(count, free) if len(free) >= count else ()
        for gpu in chosen:
            held.callback(os.close, descriptors.pop(gpu))
    finally:
        for lock in descriptors.values():
            os.close(lock)
    return chosen, taken


def _best(count: int, free: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Return the group with the most NVLink connections, then the most free memory, then the lowest indices."""
    memory = {gpu: hardware.free_bytes(gpu) for gpu in free}
    pairs = itertools.combinations(free, 2) if count > 1 else ()
    links = {pair for pair in pairs if hardware.linked(*pair)}

    def worth(group: tuple[Gpu, ...]) -> tuple[int, int]:
        return sum(pair in links for pair in itertools.combinations(group, 2)), sum(memory[gpu] for gpu in group)

    return max(itertools.combinations(free, count), key=worth)
