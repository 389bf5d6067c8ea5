"""The GPUs of this machine, as NVML tells."""

from __future__ import annotations

from dataclasses import dataclass

import pynvml


@dataclass(frozen=True)
class Gpu:
    """One GPU: memory in bytes, driver as `580.65.06`, compute capability as (9, 0), the driver's CUDA as (13, 0)."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    driver: str
    capability: tuple[int, int]
    cuda: tuple[int, int] | None = None


def gpus() -> list[Gpu]:
    """Return the GPUs; none where there is no driver."""
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
    """The newest CUDA that the driver knows: NVML says 13000 for 13.0."""
    try:
        version = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
    except pynvml.NVMLError:
        return None
    return version // 1000, version % 1000 // 10
