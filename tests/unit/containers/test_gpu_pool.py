"""GPUs are taken one a container, the emptiest first; what a container holds of one is told from its neighbours."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from containers.hardware import gpu_pool
from containers.hardware.gpu import Gpu
from containers.hardware.gpu_pool import reserved
from containers.sandbox import memory

GIB = 2**30
FREE = {"GPU-a": 10 * GIB, "GPU-b": 70 * GIB}


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs as NVML would tell of them."""
    found = [Gpu(n, uuid, "H100", 80 * GIB, "580.65.06", (9, 0)) for n, uuid in enumerate(FREE)]
    monkeypatch.setattr(gpu_pool, "gpus", lambda: found)
    monkeypatch.setattr(gpu_pool, "_free_bytes", lambda gpu: FREE[gpu.uuid])


def test_the_emptiest_comes_first_and_nobody_gets_it_twice(two: None, tmp_path: Path) -> None:
    with reserved(print, tmp_path) as first, reserved(print, tmp_path) as second:
        assert first is not None
        assert second is not None
        assert (first.uuid, second.uuid) == ("GPU-b", "GPU-a")
    with reserved(print, tmp_path) as again:
        assert again is not None
        assert again.uuid == "GPU-b"


def test_who_finds_all_taken_waits_and_says_so(two: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_pool, "_POLL_SECONDS", 0.01)
    told: list[str] = []
    got: list[str] = []

    def third() -> None:
        with reserved(told.append, tmp_path) as gpu:
            got.append("" if gpu is None else gpu.uuid)

    with reserved(print, tmp_path), reserved(print, tmp_path):
        waiting = threading.Thread(target=third)
        waiting.start()
        time.sleep(0.1)
        assert got == []
    waiting.join(timeout=5)
    assert (got, told) == (["GPU-b"], ["every GPU is reserved: waiting for one"])


def test_without_a_gpu_there_is_nothing_to_reserve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_pool, "gpus", list)
    with reserved(print, tmp_path) as gpu:
        assert gpu is None


def test_a_containers_own_memory_of_a_gpu_is_told_from_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = [
        SimpleNamespace(pid=7, usedGpuMemory=3 * GIB),
        SimpleNamespace(pid=8, usedGpuMemory=GIB),
        SimpleNamespace(pid=9, usedGpuMemory=5 * GIB),
        SimpleNamespace(pid=10, usedGpuMemory=None),
    ]
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda _: SimpleNamespace(used=10 * GIB))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: processes)
    read = memory._gpu_reader("GPU-a", lambda: {7, 8, 10})
    assert read is not None
    assert read() == {"gpu_memory_bytes": 10 * GIB, "gpu_process_bytes": 4 * GIB}
