"""The GPUs of this machine, as NVML reports them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pynvml

# A GPU with more memory in use than this share belongs to another program, even if its processes are not visible
# from here; a desktop and the driver take less.
_BUSY_SHARE = 0.1


@dataclass(frozen=True)
class Gpu:
    """One GPU: memory in bytes, driver `580.65.06`, compute capability (9, 0), the driver's CUDA (13, 0)."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    driver: str
    capability: tuple[int, int]
    cuda: tuple[int, int] | None = None


def gpus() -> list[Gpu]:
    """Return the GPUs that answer NVML; none without a driver."""
    found = []
    with contextlib.suppress(pynvml.NVMLError), _nvml():
        for index in range(pynvml.nvmlDeviceGetCount()):
            with contextlib.suppress(pynvml.NVMLError):
                found.append(_describe(index))
    return found


def free_bytes(gpu: Gpu) -> int:
    """Return a GPU's free memory; 0 if it does not answer."""
    with contextlib.suppress(pynvml.NVMLError), _nvml():
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle(gpu.uuid)).free)
    return 0


def is_busy(gpu: Gpu) -> bool:
    """Whether another program computes on a GPU, or uses more of its memory than a desktop does."""
    with contextlib.suppress(pynvml.NVMLError), _nvml():
        device = handle(gpu.uuid)
        used = int(pynvml.nvmlDeviceGetMemoryInfo(device).used)
        return bool(pynvml.nvmlDeviceGetComputeRunningProcesses(device)) or used > _BUSY_SHARE * gpu.memory_bytes
    return True


def linked(one: Gpu, two: Gpu) -> bool:
    """Whether two GPUs reach each other's memory over NVLink."""
    with contextlib.suppress(pynvml.NVMLError), _nvml():
        link = pynvml.NVML_P2P_CAPS_INDEX_NVLINK
        status = pynvml.nvmlDeviceGetP2PStatus(handle(one.uuid), handle(two.uuid), link)
        return bool(status == pynvml.NVML_P2P_STATUS_OK)
    return False


def disappeared(uuids: Sequence[str]) -> str | None:
    """Say which of these GPUs do not answer NVML any more, and where to look; None if all do."""
    lost = [uuid for uuid in uuids if not _answers(uuid)]
    if not lost:
        return None
    return f"lost {' and '.join(lost)}: NVML does not find it any more; look for `Xid` in the kernel's log (`dmesg`)"


def handle(gpu: str) -> Any:  # noqa: ANN401 - a pointer of NVML's
    """Return NVML's handle of a GPU, by UUID or index; NVML must have been initialized."""
    return pynvml.nvmlDeviceGetHandleByIndex(int(gpu)) if gpu.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID(gpu)


def _answers(uuid: str) -> bool:
    with contextlib.suppress(pynvml.NVMLError), _nvml():
        pynvml.nvmlDeviceGetMemoryInfo(handle(uuid))
        return True
    return False


@contextlib.contextmanager
def _nvml() -> Iterator[None]:
    """Use NVML during the block; NVMLError without a driver."""
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _describe(index: int) -> Gpu:
    device = pynvml.nvmlDeviceGetHandleByIndex(index)
    return Gpu(
        index=index,
        uuid=pynvml.nvmlDeviceGetUUID(device),
        name=pynvml.nvmlDeviceGetName(device),
        memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(device).total),
        driver=pynvml.nvmlSystemGetDriverVersion(),
        capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(device)),
        cuda=_cuda(),
    )


def _cuda() -> tuple[int, int] | None:
    """Return the newest CUDA version that the driver supports; NVML reports 13.0 as 13000."""
    try:
        version = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
    except pynvml.NVMLError:
        return None
    return version // 1000, version % 1000 // 10
