"""Fault injection: every fault has a result, whatever happens, and none of them stops the load test."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, cast

import docker
import pytest
import scripted_server
from docker.models.containers import Container, ExecResult
from scripted_server import Script, serving

from containers.sandbox.engine_log import Failure
from containers.sandbox.memory import MemorySampler
from containers.sandbox.sandbox import Server
from evals.load import faults
from evals.load.evidence import FaultResult

GENTLE = {
    "malformed JSON", "unknown model name", "prompt over the context", "client hangs up", "slow reader",
    "1,000 connections at once",
}  # fmt: skip
ROUGH = {"engine process killed", "memory limit hit", "container killed under load"}


class Contained:
    """As much of a container as a fault touches: the scripted server, always on one port."""

    name, id = "scripted", "0"

    def __init__(self, *, broken: bool = False) -> None:
        self._broken = broken
        self._process: subprocess.Popen[str] | None = None
        self._port = "0"
        self._start()

    def _start(self) -> None:
        command = [sys.executable, scripted_server.__file__, "--service-ms", "20", "--port", self._port]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._port = self._process.stdout.readline().strip()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def attrs(self) -> dict[str, Any]:
        ports = {"8000/tcp": [{"HostPort": self._port}]}
        running = self._process is not None
        return {
            "HostConfig": {"PortBindings": ports}, "NetworkSettings": {"Ports": ports, "Networks": {}},
            "State": {"Running": running, "ExitCode": 137, "Pid": 0},
        }  # fmt: skip

    def reload(self) -> None:
        """What is known of it is always new."""

    def exec_run(self, _command: list[str]) -> Any:  # noqa: ANN401 - the SDK's
        if self._broken:
            raise docker.errors.APIError("the engine does not answer")
        return ExecResult(127, b"")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()
        self._process = None

    def restart(self, **_: int) -> None:
        if self._process is not None:
            self.kill()
        self._start()


@contextlib.contextmanager
def contained(**changes: Any) -> Iterator[Server]:  # noqa: ANN401 - `Server`'s fields
    made = Contained(broken=changes.pop("broken", False))
    try:

        def died() -> Failure | None:
            return None if made.attrs["State"]["Running"] else Failure("ended with status 137")

        yield Server(made.url, 1.0, changes.pop("memory_bytes", 1 << 30), None, sampler(**changes), died,
                     cast("Container", made))  # fmt: skip
    finally:
        with contextlib.suppress(AssertionError):
            made.kill()


def sampler(source: str = "test") -> MemorySampler:
    return MemorySampler(lambda: {"memory_bytes": 1 << 20}, source)


def bare(url: str) -> Server:
    return Server(url, 1.0, 1 << 30, None, sampler(), lambda: None)


def inflict(server: Server, recovery_s: float = 60.0) -> dict[str, FaultResult]:
    table = faults.inflict(server, "scripted", 512, recovery_s=recovery_s, progress=print)
    return {row.name: row for row in table}


def test_a_fault_that_can_not_be_inflicted_is_a_row_that_says_why() -> None:
    with serving(Script(service_ms=20, context=512)) as (url, _):
        table = inflict(bare(url))
    assert set(table) == GENTLE | ROUGH
    assert {name for name, row in table.items() if row.ok} == GENTLE
    assert {table[name].seen for name in ROUGH} == {
        "not inflicted: the server does not run in a container of Slipway's"
    }
    assert {table[name].ok for name in ROUGH} == {None}


def test_a_fault_that_ends_in_an_error_is_a_failed_row_and_the_next_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "ANSWER_SECONDS", 1.0)
    # Nothing of a streamed answer comes for a minute: who waits for its first bytes gives up.
    with serving(Script(stall_seconds=60.0, context=512)) as (url, _):
        table = inflict(bare(url))
    assert (table["client hangs up"].ok, "TimeoutError" in table["client hangs up"].seen) == (False, True)
    assert table["slow reader"].ok


def test_an_engine_that_fails_fails_the_row_and_memory_that_this_machine_lacks_is_not_filled() -> None:
    with contained(broken=True, memory_bytes=1 << 50, source="cgroup v2") as server:
        table = inflict(server)
    assert table["engine process killed"].ok is False
    assert "the engine does not answer" in table["engine process killed"].seen
    assert (table["memory limit hit"].ok, "this machine has" in table["memory limit hit"].seen) == (None, True)
    assert table["container killed under load"].ok


class _ReachedByOne(Server):
    """A server whose address only one thread of a crowd is told rightly."""

    def __getattribute__(self, name: str) -> Any:  # noqa: ANN401 - any of the fields
        of_the_rest = "ThreadPoolExecutor" in (thread := threading.current_thread().name) and not thread.endswith("_0")
        return "http://127.0.0.1:9" if name == "url" and of_the_rest else super().__getattribute__(name)


def test_a_crowd_that_can_not_all_connect_ends() -> None:
    with serving(Script(service_ms=20, context=512)) as (url, _):
        server = _ReachedByOne(url, 1.0, 1 << 30, None, sampler(), lambda: None)
        row = inflict(server)["1,000 connections at once"]
    assert (row.ok, "refused" in row.seen) == (False, True)


@pytest.mark.parametrize(("recovery_s", "ok"), [(60.0, True), (0.001, False)])
def test_a_recovery_has_a_limit_of_its_own(recovery_s: float, *, ok: bool) -> None:
    with contained() as server:
        row = inflict(server, recovery_s)["container killed under load"]
    assert (row.ok, row.limit_seconds) == (ok, recovery_s)
    assert (row.seconds or 0) > 0.001
