"""The GPUs of this machine as a pool: a container takes one for itself, and says which."""

from __future__ import annotations

import contextlib
import fcntl
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pynvml

from containers.gpu import Gpu, gpus

Progress = Callable[[str], None]

# One place for all homes of this machine: two of them must not measure on one device.
LOCKS = Path("/run/lock") if Path("/run/lock").is_dir() else Path(tempfile.gettempdir())
_POLL_SECONDS = 1.0


@contextlib.contextmanager
def reserved(progress: Progress, locks: Path = LOCKS) -> Iterator[Gpu | None]:
    """Take the GPU with the most free memory that nobody has reserved, for the time of the block; None without GPUs.

    Waits while all are taken. The kernel drops a reservation however its process ends.
    """
    found = gpus()
    if not found:
        yield None
        return
    told = False
    while True:
        for gpu in sorted(found, key=_free_bytes, reverse=True):
            with contextlib.ExitStack() as stack:
                file = stack.enter_context((locks / f"slipway-gpu-{gpu.uuid}.lock").open("w"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield gpu
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
