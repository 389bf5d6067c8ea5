"""The GPUs of this machine, as NVML reports them."""

from __future__ import annotations

from dataclasses import dataclass

import pynvml


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
    """Return the GPUs; none without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_describe(index) for index in range(pynvml.nvmlDeviceGetCount())]
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
