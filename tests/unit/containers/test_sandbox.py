"""Who owns a container, and how memory is read: what needs no engine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import docker
import pytest
from docker.models.containers import Container

from containers.engine.owner import OWNER_LABEL, home_digest, is_alive, left_behind, marked, ownership, start_time
from containers.errors import SandboxError
from containers.sandbox import container as containers_of_engine
from containers.sandbox import memory
from containers.sandbox.container import remove, terminated_by_exception
from containers.sandbox.memory import MemorySampler, _stats_reader


def test_this_process_owns_what_it_starts(tmp_path: Path) -> None:
    assert is_alive(ownership(tmp_path)[OWNER_LABEL])


def test_a_dead_process_owns_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = f"{process.pid}:{start_time(process.pid)}"
    assert is_alive(owner)
    process.kill()
    time.sleep(0.2)
    assert not is_alive(owner)  # a zombie still
    process.communicate()
    assert not is_alive(owner)


@pytest.mark.parametrize(
    "owner", ["", "1", "x:1", ":", pytest.param(f"{os.getpid()}:1", id="our own"), f"{2**22 + 1}:None"]
)
def test_a_process_id_that_someone_else_has_by_now_owns_nothing(owner: str) -> None:
    assert not is_alive(owner)


def test_a_home_is_known_by_its_path_however_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert home_digest(tmp_path) == home_digest(tmp_path / "link")
    assert home_digest(tmp_path) != home_digest(tmp_path / "other")


def test_a_marker_lies_in_the_home_while_a_sandbox_is_open_and_tells_who_died(tmp_path: Path) -> None:
    with marked(tmp_path, "mine"):
        assert left_behind(tmp_path) == []
        (tmp_path / "sandbox" / "theirs").write_text(f"{socket.gethostname()} {os.getpid()}:1")
        (tmp_path / "sandbox" / "another-machines").write_text(f"elsewhere {os.getpid()}:1")
        assert [marker.name for marker in left_behind(tmp_path)] == ["theirs"]
    assert {marker.name for marker in (tmp_path / "sandbox").iterdir()} == {"theirs", "another-machines"}


UNKILLED = [
    "Could not kill running container 9fd1, cannot remove - container 9fd1 PID 5650 is zombie and can not be killed.",
    'cannot remove container "slipway-load": could not kill: container 9fd1 PID 5650 is zombie and can not be killed.',
]


class _Unkilled:
    """A stand-in for a container whose killed process ends after so many attempts, in the words of an engine."""

    name = "slipway-load"

    def __init__(self, attempts: int, said: str) -> None:
        self.left = attempts
        self.said = said

    def remove(self, *, force: bool, v: bool) -> None:
        assert force
        assert v
        self.left -= 1
        if self.left >= 0:
            raise docker.errors.APIError("409 Client Error", explanation=self.said)


@pytest.mark.parametrize("said", UNKILLED, ids=["Docker 20.10", "Docker 28"])
def test_a_container_whose_process_takes_long_to_end_is_removed(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers_of_engine, "_PAUSE_SECONDS", 0.0)
    slow = _Unkilled(3, said)
    remove(cast("Container", slow))
    assert slow.left == -1


def test_a_container_whose_process_never_ends_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers_of_engine, "_KILLED_SECONDS", 0.05)
    monkeypatch.setattr(containers_of_engine, "_PAUSE_SECONDS", 0.0)
    with pytest.raises(SandboxError, match="can't remove the container slipway-load: Could not kill"):
        remove(cast("Container", _Unkilled(10**9, UNKILLED[0])))


def test_sigterm_unwinds_the_block_and_is_given_back() -> None:
    # A command that ran in this process before may have left its own handler.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as raised, terminated_by_exception():
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_somebody_elses_handler_stays() -> None:
    def theirs(*_: object) -> None:
        """Nothing."""

    before = signal.signal(signal.SIGTERM, theirs)
    try:
        with terminated_by_exception():
            assert signal.getsignal(signal.SIGTERM) is theirs
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_sampler_keeps_phases_and_the_peak_and_survives_the_end_of_what_it_watches() -> None:
    values = iter([{"memory_bytes": 5}, {"memory_bytes": 9}, {"memory_bytes": 7}])
    sampler = MemorySampler(lambda: next(values, None), "test", interval=0.001)
    assert sampler.peak() is None
    sampler.start()
    time.sleep(0.1)
    sampler.phase = "late"
    sampler.stop()
    assert [sample.memory_bytes for sample in sampler.samples] == [5, 9, 7]
    assert sampler.peak() == 9
    assert sampler.peak("gpu_memory_bytes") is None


def test_the_memory_of_each_rank_is_read_by_its_title(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    titles = {1: "python -m vllm", 39: "VLLM::Worker_TP0", 40: "VLLM::Worker_TP1", 41: "VLLM::Worker_PP1_TP0"}
    for pid, title in titles.items():
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_bytes(title.encode() + b"\0")
        status = f"Name:\tx\nRssAnon:\t{pid} kB\nRssFile:\t9 kB\nRssShmem:\t1 kB\n"
        (tmp_path / str(pid) / "status").write_text(status)
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    assert memory._worker_reader(lambda: {1, 39, 40, 41, 99})() == {
        "worker_tp0_bytes": 40 * 1024, "worker_tp1_bytes": 41 * 1024, "worker_pp1_tp0_bytes": 42 * 1024,
    }  # fmt: skip


def test_a_time_without_samples_is_told() -> None:
    values = iter([{"memory_bytes": 5}, None, {"usage_bytes": 1}])
    sampler = MemorySampler(lambda: next(values, None), "test", interval=0.001)
    sampler.start()
    time.sleep(0.2)
    assert sampler.longest_gap() > 0.15
    sampler.stop()


def test_an_engine_that_does_not_answer_once_ends_no_sampler() -> None:
    answers = [{"memory_stats": {"usage": 7}}, docker.errors.APIError("busy"), {"memory_stats": {"usage": 9}}]

    class Busy:
        def stats(self, **_: bool) -> object:
            answer = answers.pop(0) if answers else {}
            if isinstance(answer, Exception):
                raise answer
            return answer

    sampler = MemorySampler(_stats_reader(cast("Container", Busy())), "docker", interval=0.001)
    sampler.start()
    time.sleep(0.1)
    sampler.stop()
    assert [sample.memory_bytes for sample in sampler.samples] == [7, 9]


def test_a_sampler_takes_its_last_sample_after_it_was_told_to_stop() -> None:
    sampler = MemorySampler(lambda: {"memory_bytes": 1}, "test", interval=10)
    sampler.start()
    time.sleep(0.05)
    sampler.phase = "after"
    sampler.stop()
    sampler.stop()
    assert [sample.phase for sample in sampler.samples] == ["start", "after"]


@pytest.mark.parametrize(
    ("line", "folder", "names", "source"),
    [
        ("9:memory:/docker/abc", "memory/docker/abc", ("memory.usage_in_bytes", "total_inactive_file"), "cgroup v1"),
        (
            "0::/system.slice/docker-abc.scope",
            "system.slice/docker-abc.scope",
            ("memory.current", "inactive_file"),
            "cgroup v2",
        ),
    ],
)
def test_memory_is_read_from_either_kind_of_cgroup_without_reclaimable_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, line: str, folder: str, names: tuple[str, str], source: str
) -> None:
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc" / "7").mkdir(parents=True)
    (tmp_path / "proc" / "7" / "cgroup").write_text(f"3:cpu:/docker/abc\n{line}\n")
    place = tmp_path / "cgroup" / folder
    place.mkdir(parents=True)
    (place / names[0]).write_text("1000\n")
    (place / "memory.stat").write_text(f"cache 500\n{names[1]} 300\n")
    found = memory._cgroup_reader(7, "abc")
    assert found is not None
    assert found[1] == source
    assert found[0]() == {"memory_bytes": 700, "usage_bytes": 1000}
    (place / names[0]).unlink()
    assert found[0]() is None
    assert memory._cgroup_reader(7, "another") is None
    assert memory._cgroup_reader(8, "abc") is None
