"""Containers reserve the GPUs that their models need, of a stand-in for NVML; the memory of each is sampled."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest
import stand_in_nvml
from stand_in_nvml import GIB, StandInGpu, eight

from checkout import CHECKOUT
from containers.hardware import gpu_pool
from containers.hardware.gpu import disappeared, gpus
from containers.hardware.gpu_pool import GpuPoolError, reserved
from containers.sandbox import memory
from containers.sandbox.engine_log import Failure
from containers.sandbox.sandbox import Server

HOLD = """
import sys
from pathlib import Path
import stand_in_nvml
from containers.hardware.gpu_pool import reserved
stand_in_nvml.install(Path(sys.argv[1]))
with reserved(int(sys.argv[3]), lambda line: print(line, flush=True), Path(sys.argv[2])) as gpus:
    print(" ".join(gpu.uuid for gpu in gpus), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of a machine with eight GPUs, two groups of four with NVLink in each."""
    file = tmp_path / "gpus.json"
    stand_in_nvml.write(file, eight())
    for name in [name for name in dir(pynvml) if name.startswith("nvml")]:
        monkeypatch.setattr(pynvml, name, getattr(pynvml, name))  # restored after the test
    monkeypatch.setattr(gpu_pool, "_POLL_SECONDS", 0.01)
    stand_in_nvml.install(file)
    return file


@contextmanager
def holder(machine: Path, count: int) -> Iterator[subprocess.Popen[str]]:
    """Another process that reserves so many GPUs, prints what it waits for and what it gets, and holds them."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(machine), str(machine.parent), str(count)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=CHECKOUT,
        env={"PYTHONPATH": f"{CHECKOUT / 'tests'}:{CHECKOUT}"},
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def changed(machine: Path, number: int, **changes: object) -> None:
    """Change one GPU of the machine."""
    found = stand_in_nvml._read(machine)
    found[number] = replace(found[number], **changes)  # type: ignore[arg-type]  # by name
    stand_in_nvml.write(machine, found)


def test_two_processes_reserve_four_each_with_nvlink_among_them(machine: Path) -> None:
    with holder(machine, 4) as first, holder(machine, 4) as second:
        got = sorted(line(process) for process in (first, second))
    assert got == ["GPU-0 GPU-1 GPU-2 GPU-3", "GPU-4 GPU-5 GPU-6 GPU-7"]


def test_a_busy_gpu_is_not_taken_and_who_lacks_one_waits_until_it_is_free(machine: Path) -> None:
    changed(machine, 6, processes=((4711, 3 * GIB),), used=3 * GIB)
    with holder(machine, 4) as first, holder(machine, 4) as second:
        one, other = line(first), line(second)
        waiting, given = sorted((one, other), key=lambda told: told.startswith("GPU"))
        assert given == "GPU-0 GPU-1 GPU-2 GPU-3"
        assert waiting.startswith("waiting for 4 GPUs: of 8 ")
        assert "GPU-6 is used by another program" in waiting
        assert "GPU-0 is reserved" in waiting
        changed(machine, 6, processes=(), used=0)
        assert line(second if one == given else first) == "GPU-4 GPU-5 GPU-6 GPU-7"


def test_memory_in_use_by_a_program_that_is_not_visible_makes_a_gpu_busy(machine: Path, tmp_path: Path) -> None:
    for number in range(7):
        changed(machine, number, used=20 * GIB)
    with reserved(1, print, tmp_path) as found:
        assert [gpu.uuid for gpu in found] == ["GPU-7"]


def test_one_that_disappears_while_a_process_waits_is_named_in_one_error(machine: Path, tmp_path: Path) -> None:
    with holder(machine, 6) as other:
        assert line(other) == "GPU-0 GPU-1 GPU-2 GPU-3 GPU-4 GPU-5"

        def lose(_: str) -> None:
            changed(machine, 7, answers=False)

        with (
            pytest.raises(GpuPoolError, match=r"lost GPU-7: NVML does not find it any more"),
            reserved(4, lose, tmp_path),
        ):
            pass


def test_one_that_disappears_from_a_server_is_named(machine: Path) -> None:
    assert disappeared(["GPU-2", "GPU-3"]) is None
    changed(machine, 3, answers=False)
    assert disappeared(["GPU-2", "GPU-3"]) == (
        "lost GPU-3: NVML does not find it any more; look for `Xid` in the kernel's log (`dmesg`)"
    )
    assert [gpu.uuid for gpu in gpus()] == [f"GPU-{number}" for number in (0, 1, 2, 4, 5, 6, 7)]


def test_a_server_fails_by_its_lost_gpu_and_not_by_what_the_engine_says_of_it(machine: Path) -> None:
    sampler = memory.MemorySampler(lambda: None, "test")
    server = Server("http://x", 1.0, 1, None, sampler, lambda: Failure("ended with status 1"), gpus=("GPU-2", "GPU-3"))
    assert str(server.failed()) == "ended with status 1"
    changed(machine, 3, answers=False)
    assert str(server.failed()).startswith("lost GPU-3: ")


def test_more_than_the_machine_has_is_refused_at_once(machine: Path, tmp_path: Path) -> None:
    with pytest.raises(GpuPoolError, match="16 GPUs needed, and this machine has 8"), reserved(16, print, tmp_path):
        pass


def test_who_may_not_wait_is_told_what_is_taken(machine: Path, tmp_path: Path) -> None:
    stand_in_nvml.write(machine, [StandInGpu("GPU-a")])
    with (
        reserved(1, print, tmp_path),
        pytest.raises(GpuPoolError, match="one GPU needed, and of 1 GPU-a is reserved"),
        reserved(1, print, tmp_path, wait=False),
    ):
        pass


def test_neighbours_count_more_than_free_memory_and_free_memory_decides_among_them(
    machine: Path, tmp_path: Path
) -> None:
    changed(machine, 0, used=GIB)
    with reserved(4, print, tmp_path) as found:
        assert [gpu.index for gpu in found] == [4, 5, 6, 7]
    with reserved(1, print, tmp_path) as one, reserved(4, print, tmp_path) as four:
        assert [gpu.index for gpu in one] == [1]
        assert [gpu.index for gpu in four] == [4, 5, 6, 7]


def test_the_gpus_of_a_killed_process_are_free(machine: Path, tmp_path: Path) -> None:
    with holder(machine, 8) as other:
        assert line(other).startswith("GPU-0 ")
        other.kill()
        other.wait()
        with reserved(8, print, tmp_path) as found:
            assert len(found) == 8


def test_who_finds_all_taken_waits_and_says_so(machine: Path, tmp_path: Path) -> None:
    stand_in_nvml.write(machine, [StandInGpu("GPU-a"), StandInGpu("GPU-b", used=2 * GIB)])
    told: list[str] = []
    got: list[str] = []

    def third() -> None:
        with reserved(1, told.append, tmp_path) as found:
            got.extend(gpu.uuid for gpu in found)

    with reserved(1, print, tmp_path) as first, reserved(1, print, tmp_path) as second:
        assert [gpu.uuid for gpu in (*first, *second)] == ["GPU-a", "GPU-b"]
        waiting = threading.Thread(target=third)
        waiting.start()
        time.sleep(0.1)
        assert got == []
    waiting.join(timeout=5)
    assert (got, told) == (["GPU-a"], ["waiting for one GPU: of 2 GPU-a is reserved, GPU-b is reserved"])


def test_without_a_gpu_there_is_nothing_to_reserve(machine: Path, tmp_path: Path) -> None:
    with reserved(0, print, tmp_path) as found:
        assert found == ()
    stand_in_nvml.write(machine, [])
    with reserved(4, print, tmp_path) as found:
        assert found == ()


def test_the_memory_of_each_gpu_is_read_and_a_containers_own_is_told_from_its_neighbours(machine: Path) -> None:
    changed(machine, 4, used=10 * GIB, processes=((7, 3 * GIB), (8, GIB), (9, 5 * GIB), (10, None)))
    changed(machine, 5, used=2 * GIB)
    readers = memory.gpu_readers(["GPU-4", "GPU-5"], lambda: {7, 8, 10})
    read = {name: value for reader in readers for name, value in reader().items()}
    assert read == {
        "gpu_0_memory_bytes": 10 * GIB, "gpu_0_process_bytes": 4 * GIB, "gpu_1_memory_bytes": 2 * GIB,
    }  # fmt: skip
