"""A pool of this machine's GPUs: each container reserves one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pynvml

from containers.hardware.gpu import Gpu, gpus
from containers.hardware.machine_locks import try_lock
from registry.progress import Progress

_POLL_SECONDS = 1.0


@contextlib.contextmanager
def reserved(progress: Progress, locks: Path) -> Iterator[Gpu | None]:
    """Reserve the unreserved GPU with the most free memory during the block; None without GPUs.

    Waits while all are reserved. ``locks`` is the machine's folder of locks (`containers.hardware.machine_locks`), so
    that two homes never measure on one device. The kernel drops a reservation when its process ends.
    """
    found = gpus()
    if not found:
        yield None
        return
    told = False
    while True:
        for gpu in sorted(found, key=_free_bytes, reverse=True):
            lock = try_lock(locks, f"slipway-gpu-{gpu.uuid}.lock")
            if lock is None:
                continue
            try:
                yield gpu
            finally:
                os.close(lock)
            return
        if not told:
            progress("every GPU is reserved: waiting for one")
            told = True
        time.sleep(_POLL_SECONDS)


def _free_bytes(gpu: Gpu) -> int:
    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)).free)
    except pynvml.NVMLError:
        return 0
