"""A stand-in for NVML: the machine's GPUs are those of a JSON file, which a test may change while processes run.

No GPU and no driver are needed; separate processes that `install` the same file see the same machine.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import pynvml

GIB = 2**30


@dataclass
class StandInGpu:
    """A GPU: its memory, processes with the memory of each in bytes, the indices it has NVLink to, if it answers."""

    uuid: str
    total: int = 80 * GIB
    used: int = 0
    processes: tuple[tuple[int, int | None], ...] = ()
    nvlink: tuple[int, ...] = ()
    answers: bool = True


def write(file: Path, gpus: list[StandInGpu]) -> None:
    """Make these the machine's GPUs, at once for every process."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps([asdict(gpu) for gpu in gpus]))
    part.replace(file)


def eight(groups: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3), (4, 5, 6, 7))) -> list[StandInGpu]:
    """Eight H100, those of each group with NVLink among them."""
    peers = {number: group for group in groups for number in group}
    return [
        StandInGpu(f"GPU-{number}", nvlink=tuple(peer for peer in peers[number] if peer != number))
        for number in range(8)
    ]


def install(file: Path) -> None:
    """Answer NVML's calls in this process from ``file``."""
    functions = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.95.05",
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 13000,
        "nvmlDeviceGetCount": lambda: len(_read(file)),
        "nvmlDeviceGetHandleByIndex": lambda index: _at(file, index).uuid,
        "nvmlDeviceGetHandleByUUID": lambda uuid: _of(file, uuid).uuid,
        "nvmlDeviceGetUUID": lambda uuid: uuid,
        "nvmlDeviceGetName": lambda _: "NVIDIA H100 80GB HBM3",
        "nvmlDeviceGetCudaComputeCapability": lambda _: (9, 0),
        "nvmlDeviceGetMemoryInfo": lambda uuid: _memory(_of(file, uuid)),
        "nvmlDeviceGetComputeRunningProcesses": lambda uuid: [
            SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in _of(file, uuid).processes
        ],
        "nvmlDeviceGetP2PStatus": lambda one, two, _: _p2p(file, one, two),
    }
    for name, function in functions.items():
        setattr(pynvml, name, function)


def _read(file: Path) -> list[StandInGpu]:
    return [StandInGpu(**entry) for entry in json.loads(file.read_text())]


def _at(file: Path, index: int) -> StandInGpu:
    gpu = _read(file)[index]
    if not gpu.answers:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    return gpu


def _of(file: Path, uuid: str) -> StandInGpu:
    for index, gpu in enumerate(_read(file)):
        if gpu.uuid == uuid:
            return _at(file, index)
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)


def _memory(gpu: StandInGpu) -> SimpleNamespace:
    return SimpleNamespace(total=gpu.total, used=gpu.used, free=gpu.total - gpu.used)


def _p2p(file: Path, one: str, two: str) -> int:
    gpus = _read(file)
    peers = {gpus[index].uuid for index in _of(file, one).nvlink}
    return int(pynvml.NVML_P2P_STATUS_OK if two in peers else pynvml.NVML_P2P_STATUS_NOT_SUPPORTED)
