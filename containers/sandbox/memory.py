"""Samples a container's memory: from its cgroup or Docker's statistics, of each worker, and of each GPU from NVML."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import requests
from docker.models.containers import Container
from pydantic import BaseModel, ConfigDict, Field

from containers.hardware.gpu import handle

Reader = Callable[[], Mapping[str, int] | None]

_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
# How vLLM titles the process of a rank, if it has several: `VLLM::Worker_TP1`, `VLLM::Worker_PP0_TP1`.
_WORKER = re.compile(rb"VLLM::Worker_([A-Z]+\d+(?:_[A-Z]+\d+)*)")


class MemorySample(BaseModel):
    """A server's memory at one time, in bytes; None for what could not be read. ``memory.json`` is a list of these.

    ``seconds`` are those since the start; ``phase`` is what the load test did then.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, int] = Field(init=False)  # of each GPU, see `container_reader`

    seconds: float
    phase: str
    memory_bytes: int | None = None
    """In use by the container, without inactive page cache."""
    usage_bytes: int | None = None
    """With page cache."""

    @property
    def readings(self) -> Mapping[str, int]:
        """What could be read, by name."""
        return self.model_dump(exclude={"seconds", "phase"}, exclude_none=True)


@dataclass
class MemorySampler:
    """Calls ``read`` every ``interval`` seconds in a thread, from `start` to `stop`.

    ``read`` returns bytes by name, ``memory_bytes`` among them, or None if the container is gone or the engine did not
    answer. Earlier samples are kept, so the peak before an out-of-memory kill is known. Each sample has the seconds
    since the start and the ``phase`` at that time.
    """

    read: Reader
    source: str
    interval: float = 0.1
    phase: str = "start"
    samples: list[MemorySample] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Start sampling."""
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and stop; the samples are kept."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def peak(self, name: str = "memory_bytes", outside: str | None = None) -> int | None:
        """Return the highest value of ``name`` outside one phase; None without samples."""
        readings = [sample.readings for sample in list(self.samples) if sample.phase != outside]
        return max((each[name] for each in readings if name in each), default=None)

    def peaks_by_phase(self, name: str = "memory_bytes") -> dict[str, int]:
        """Return the highest value of ``name`` in each phase, in the order of the phases."""
        peaks: dict[str, int] = {}
        for sample in list(self.samples):
            read = sample.readings.get(name)
            if read is not None:
                peaks[sample.phase] = max(peaks.get(sample.phase, 0), read)
        return peaks

    def hertz(self) -> float | None:
        """Return the measured number of samples per second; None with fewer than two."""
        samples = list(self.samples)
        span = samples[-1].seconds - samples[0].seconds if samples else 0.0
        return (len(samples) - 1) / span if span > 0 else None

    def longest_gap(self, name: str = "memory_bytes") -> float:
        """Return the longest time without a sample of ``name`` since the start, in seconds."""
        times = [sample.seconds for sample in list(self.samples) if name in sample.readings]
        ends = [0.0, *times, time.monotonic() - self._started]
        return max(later - earlier for earlier, later in itertools.pairwise(ends))

    def _run(self) -> None:
        started = self._started
        number = 0
        ended = False
        while not ended:
            # Checked before the sample, so that the last sample is taken after `stop` was called.
            ended = self._ended.wait(max(0.0, started + number * self.interval - time.monotonic()))
            values = self.read()
            if values is not None:
                self.samples.append(MemorySample(seconds=time.monotonic() - started, phase=self.phase, **values))
            # On a busy machine, samples that are overdue are skipped, not taken in a burst.
            number = max(number + 1, int((time.monotonic() - started) / self.interval))


def container_reader(container: Container, gpus: Sequence[str] = ()) -> tuple[Reader, str]:
    """Return a reader of a running container's memory, and the name of its source.

    The source is the container's cgroup if the engine is on this machine (it survives restarts), else Docker's
    statistics (about one sample per second). If the engine's ranks are processes of their own, the reader adds the
    memory of each (``worker_tp0_bytes``). For each of ``gpus`` it adds the memory in use on that device
    (``gpu_0_memory_bytes``) and by the container's own processes (``gpu_0_process_bytes``, if the driver reports it).
    """
    container.reload()
    found = _cgroup_reader(container.attrs["State"]["Pid"], container.id)
    read, source = found or (_stats_reader(container), "docker")
    pids = lambda: _pids(container)  # noqa: E731
    devices = [] if not gpus else gpu_readers(gpus, pids)
    more = [*devices, *([] if found is None else [_worker_reader(pids)])]

    def all_of_them() -> Mapping[str, int] | None:
        values = read()
        if values is None:
            return None
        return dict(itertools.chain(values.items(), *(each().items() for each in more)))

    return all_of_them, f"{source} and nvml" if devices else source


def _cgroup_reader(pid: int, container_id: str | None) -> tuple[Reader, str] | None:
    """Find the container's memory cgroup by its first process; None if that process is not on this machine."""
    for folder, usage, source in _cgroups(pid, container_id):
        if (folder / usage).exists():
            return _file_reader(folder / usage, folder / "memory.stat"), source
    return None


def _cgroups(pid: int, container_id: str | None) -> Iterator[tuple[Path, str, str]]:
    """Yield candidates for the container's memory cgroup: the folder, the name of its usage file, and its version."""
    try:
        lines = (_PROC / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if not container_id or container_id not in path:
            continue
        if "memory" in controllers.split(","):
            yield _CGROUPS / "memory" / path.lstrip("/"), "memory.usage_in_bytes", "cgroup v1"
        elif hierarchy == "0":
            yield _CGROUPS / path.lstrip("/"), "memory.current", "cgroup v2"


def _file_reader(usage: Path, stat: Path) -> Reader:
    """Return a reader of usage without inactive page cache, as ``docker stats`` counts it."""

    def read() -> Mapping[str, int] | None:
        try:
            total = int(usage.read_text())
            fields = dict(line.split() for line in stat.read_text().splitlines())
        except (OSError, ValueError):
            return None
        cache = int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
        return {"memory_bytes": max(0, total - cache), "usage_bytes": total}

    return read


def _stats_reader(container: Container) -> Reader:
    def read() -> Mapping[str, int] | None:
        try:
            stats: Any = container.stats(stream=False)  # a dict with stream=False
        except (docker.errors.DockerException, requests.RequestException, ValueError):
            return None
        memory = stats.get("memory_stats", {})
        if "usage" not in memory:
            return None
        fields = memory.get("stats", {})
        cache = fields.get("total_inactive_file", fields.get("inactive_file", 0))
        return {"memory_bytes": max(0, memory["usage"] - cache), "usage_bytes": memory["usage"]}

    return read


def _pids(container: Container) -> set[int]:
    """Return the container's process ids on this machine; none if its cgroup can't be read."""
    for folder, _, _ in _cgroups(container.attrs["State"]["Pid"], container.id):
        with contextlib.suppress(OSError):
            return {int(line) for line in (folder / "cgroup.procs").read_text().split()}
    return set()


def _worker_reader(pids: Callable[[], set[int]]) -> Callable[[], Mapping[str, int]]:
    """Return a reader of the memory that each rank of the engine has for itself or shares with other ranks."""

    def read() -> Mapping[str, int]:
        values: dict[str, int] = {}
        for pid in sorted(pids()):
            with contextlib.suppress(OSError, ValueError, KeyError):
                rank = _WORKER.match((_PROC / str(pid) / "cmdline").read_bytes())
                if rank is not None:
                    lines = (_PROC / str(pid) / "status").read_text().splitlines()
                    fields = dict(line.split(":", 1) for line in lines)
                    kilobytes = sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))
                    values[f"worker_{rank[1].decode().lower()}_bytes"] = 1024 * kilobytes
        return values

    return read


def gpu_readers(gpus: Sequence[str], pids: Callable[[], set[int]]) -> list[Callable[[], Mapping[str, int]]]:
    """Return readers of the memory in use on devices (by index or UUID) and by processes; none if NVML lacks one."""
    import pynvml  # noqa: PLC0415 - needed only with a GPU

    try:
        pynvml.nvmlInit()
        handles = [handle(gpu) for gpu in gpus]
    except pynvml.NVMLError:
        return []

    def read(number: int, device: Any) -> Mapping[str, int]:  # noqa: ANN401 - a pointer of NVML's
        values: dict[str, int] = {}
        with contextlib.suppress(pynvml.NVMLError):
            values[f"gpu_{number}_memory_bytes"] = int(pynvml.nvmlDeviceGetMemoryInfo(device).used)
            wanted = pids()
            held = [
                process.usedGpuMemory
                for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device)
                if process.pid in wanted and process.usedGpuMemory is not None
            ]
            if held:
                values[f"gpu_{number}_process_bytes"] = sum(held)
        return values

    return [functools.partial(read, number, device) for number, device in enumerate(handles)]
