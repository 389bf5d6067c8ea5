"""The GPUs of this machine as a pool: a container takes one for itself, and says which."""

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
    """Take the GPU with the most free memory that nobody has reserved, for the time of the block; None without GPUs.

    ``locks`` is the machine's folder of locks (`containers.hardware.machine_locks`): two homes must not measure on one
    device. Waits while all are taken. The kernel drops a reservation however its process ends.
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
