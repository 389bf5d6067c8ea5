"""Fault injection: what a server must survive, and how it must report it.

Each fault is one function that inflicts it and returns what was seen; the table at the end states what must hold. The
faults that end the server come last, and each of them waits until the server is back.
"""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import docker
import httpx
from docker.models.containers import Container

from containers.errors import ContainerError
from containers.sandbox.sandbox import Server
from evals.load.evidence import FaultResult
from registry.progress import Progress

CONNECTIONS = 1000
# A server that survives a fault must answer within this time.
ANSWER_SECONDS = 30.0
# A server whose engine died must be unhealthy on /health, or gone, within this time.
UNHEALTHY_SECONDS = 30.0
_ENGINE_PROCESS = "EngineCore"
_CONNECTION_THREADS = 8
# Files that this process has open beside the connections.
_OTHER_FILES = 256
_MEMINFO = Path("/proc/meminfo")
# What this machine keeps free while a container's memory is filled.
_SPARE_BYTES = 256 << 20


@dataclass(frozen=True)
class FaultOutcome:
    """What was seen, in words, and whether it was as required: None if the fault could not be inflicted.

    ``seconds`` is how long the recovery took, ``limit_seconds`` how long it may take.
    """

    words: str
    ok: bool | None
    seconds: float | None = None
    limit_seconds: float | None = None


@dataclass
class FaultTarget:
    """The server, and how to send it requests."""

    server: Server
    model: str
    context: int | None
    recovery_s: float

    @property
    def container(self) -> Container:
        """The server's container; faults that need one are left out for other servers."""
        assert self.server.container is not None  # noqa: S101 - `inflict` asked
        return self.server.container

    @property
    def url(self) -> str:
        """The URL of completions; a restart may change it."""
        return f"{self.server.url}/v1/completions"

    def body(self, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        """A small request, with ``changes``."""
        return {"model": self.model, "prompt": "import", "max_tokens": 4, "temperature": 0, **changes}

    def answers(self) -> bool:
        """Whether the server is healthy and answers a small request in time."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if self.is_healthy() and self.ask().status_code == httpx.codes.OK:
                    return True
            time.sleep(0.2)
        return False

    def ask(self, **changes: Any) -> httpx.Response:  # noqa: ANN401 - JSON
        """Send a small request."""
        return httpx.post(self.url, json=self.body(**changes), timeout=ANSWER_SECONDS, trust_env=False)

    def is_healthy(self) -> bool:
        """Whether ``/health`` says so; no answer counts as unhealthy."""
        try:
            return httpx.get(f"{self.server.url}/health", timeout=5, trust_env=False).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False


def inflict(
    server: Server, model: str, context: int | None, *, recovery_s: float, progress: Progress
) -> list[FaultResult]:
    """Inflict every fault and return a result for each.

    ``ok`` is None for a fault that could not be inflicted, and ``seen`` says why. A fault that ends in an error of the
    network or of the engine was not survived. ``recovery_s`` is how long the server may take from a restart to its next
    answer.
    """
    target = FaultTarget(server, model, context, recovery_s)
    results: list[FaultResult] = []
    gone = False
    for name, must, fault in (*_GENTLE, *_ROUGH):
        if gone:
            outcome = _left_out("the server did not recover from the fault before")
        elif server.container is None and (name, must, fault) in _ROUGH:
            outcome = _left_out("the server does not run in a container of Slipway's")
        else:
            outcome = _tried(fault, target)
            gone = server.died() is not None and _lost(target) is not None
        verdict = "NOT INFLICTED" if outcome.ok is None else "survived" if outcome.ok else "NOT SURVIVED"
        progress(f"{name}: {verdict}; {outcome.words}")
        results.append(
            FaultResult(
                name=name,
                must=must,
                seen=outcome.words,
                ok=outcome.ok,
                seconds=outcome.seconds,
                limit_seconds=outcome.limit_seconds,
            )
        )
    return results


def _tried(fault: Fault, target: FaultTarget) -> FaultOutcome:
    try:
        return fault(target)
    except (OSError, httpx.HTTPError, docker.errors.DockerException, ContainerError) as error:
        return FaultOutcome(f"it ended in an error: {type(error).__name__}: {error}", ok=False)


def _left_out(why: str) -> FaultOutcome:
    return FaultOutcome(f"not inflicted: {why}", ok=None)


def _refused(target: FaultTarget, allowed: tuple[int, ...], send: Callable[[], httpx.Response]) -> FaultOutcome:
    """Send a wrong request: the server must refuse it with the right status and a reason, and still answer others."""
    try:
        reply = send()
    except httpx.HTTPError as error:
        return FaultOutcome(f"no HTTP answer: {type(error).__name__}", ok=False)
    try:
        reasoned = "error" in reply.json() or "detail" in reply.json()
    except ValueError:
        reasoned = False
    alive = target.answers()
    words = f"HTTP {reply.status_code}, {'with' if reasoned else 'without'} a reason in JSON"
    return FaultOutcome(
        words if alive else f"{words}; afterwards the server does not answer",
        ok=reply.status_code in allowed and reasoned and alive,
    )


def _malformed(target: FaultTarget) -> FaultOutcome:
    headers = {"Content-Type": "application/json"}
    return _refused(
        target, (400, 422),
        lambda: httpx.post(target.url, content=b'{"model": ', headers=headers, timeout=ANSWER_SECONDS, trust_env=False),
    )  # fmt: skip


def _unknown_model(target: FaultTarget) -> FaultOutcome:
    return _refused(target, (404,), lambda: target.ask(model="no-such-model"))


def _too_long(target: FaultTarget) -> FaultOutcome:
    words = "import os " * (target.context or 200_000)
    return _refused(target, (400, 413), lambda: target.ask(prompt=words))


def _hangs_up(target: FaultTarget) -> FaultOutcome:
    with _stream(target, max_tokens=_long(target)) as stream:
        stream.recv(256)
    return _others(target)


def _slow_reader(target: FaultTarget) -> FaultOutcome:
    """Send a request and read nothing of the answer; others must not wait for that."""
    with _stream(target, max_tokens=_long(target)):
        return _others(target)


def _others(target: FaultTarget) -> FaultOutcome:
    """Whether, and when, another client is answered."""
    started = time.monotonic()
    ok = target.answers()
    seconds = time.monotonic() - started
    words = f"answered in {seconds:.1f} s" if ok else f"no answer in {ANSWER_SECONDS:.0f} s"
    return FaultOutcome(words, ok=ok, seconds=seconds, limit_seconds=ANSWER_SECONDS)


def _many_connections(target: FaultTarget) -> FaultOutcome:
    """Open very many connections, send a request on each, and read the answers."""
    payload = _payload(target, max_tokens=1)
    gate = threading.Barrier(_CONNECTION_THREADS, timeout=4 * ANSWER_SECONDS)
    answers: list[str] = []

    def connect(count: int) -> None:
        with contextlib.ExitStack() as stack:
            try:
                sockets = [stack.enter_context(_connect(target)) for _ in range(count)]
            except OSError:
                gate.abort()  # otherwise the other threads would wait for this one
                raise
            gate.wait()
            for each in sockets:
                each.sendall(payload)
            for each in sockets:
                each.settimeout(4 * ANSWER_SECONDS)
                answers.append(each.recv(64).split(b" ")[1].decode())

    errors = []
    with _open_files(CONNECTIONS + _OTHER_FILES) as most, ThreadPoolExecutor(_CONNECTION_THREADS) as pool:
        if most < CONNECTIONS + _OTHER_FILES:
            return _left_out(f"this machine allows a process {most} open files (`ulimit -Hn`)")
        for done in [pool.submit(connect, CONNECTIONS // _CONNECTION_THREADS) for _ in range(_CONNECTION_THREADS)]:
            try:
                done.result()
            except threading.BrokenBarrierError:
                errors.append("not all connections could be opened")
            except (OSError, IndexError) as error:
                errors.insert(0, f"{type(error).__name__}: {error}")
    counts = ", ".join(f"{answers.count(status)} times {status}" for status in sorted(set(answers)))
    ok = len(answers) == CONNECTIONS and set(answers) <= {"200", "429", "503"} and target.answers()
    return FaultOutcome("; ".join([counts or "no answer", *errors[:1]]), ok=ok)


@contextlib.contextmanager
def _open_files(wanted: int) -> Iterator[int]:
    """Raise this process's limit of open files, as far as allowed; yields the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(soft, wanted if hard == resource.RLIM_INFINITY else min(wanted, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _engine_killed(target: FaultTarget) -> FaultOutcome:
    """Kill the process that computes, and leave the one that listens for requests."""
    script = (
        f'for p in /proc/[0-9]*; do read -r name < $p/comm; case "$name" in *{_ENGINE_PROCESS[:8]}*) '
        "kill -9 ${p#/proc/} && echo killed;; esac; done"
    )
    if b"killed" not in target.container.exec_run(["sh", "-c", script]).output:
        return _left_out(f"the container has no process named {_ENGINE_PROCESS}, or no shell to kill it with")
    started = time.monotonic()
    while target.is_healthy() and time.monotonic() - started < UNHEALTHY_SECONDS:
        time.sleep(0.1)
    unhealthy = time.monotonic() - started
    reported = unhealthy < UNHEALTHY_SECONDS
    words = f"unhealthy after {unhealthy:.1f} s" if reported else f"still healthy after {UNHEALTHY_SECONDS:.0f} s"
    return _recovered(target, words, ok=reported)


def _out_of_memory(target: FaultTarget) -> FaultOutcome:
    """Fill the container's memory from within, until the kernel kills its largest process.

    Lowering the limit instead does not always work: cgroup v1 refuses a limit below what is in use.
    """
    lacking = _memory_lacking(target.server)
    if lacking is not None:
        return _left_out(lacking)
    with contextlib.suppress(docker.errors.APIError):
        if target.container.exec_run(["tail", "/dev/zero"]).exit_code in {126, 127}:
            return _left_out("the image has no `tail` to fill the memory with")
    started = time.monotonic()
    while time.monotonic() - started < UNHEALTHY_SECONDS:
        died = target.server.died()
        if died is not None:
            return _recovered(target, str(died), ok="ran out of memory" in died.ending)
        if time.monotonic() - started > 2 and target.answers():
            return FaultOutcome("another process was killed, the server answers", ok=True)
        time.sleep(0.2)
    return _recovered(target, "the server runs on and does not answer", ok=False)


def _memory_lacking(server: Server) -> str | None:
    """Say why this machine can't fill the container's memory: it would run out first. None where it has enough.

    If the container's cgroup can't be read, the container is on another machine, whose free memory is unknown.
    """
    if not server.memory.source.startswith("cgroup"):
        return "the container is on another machine, whose free memory is unknown"
    held = next((each.memory_bytes for each in reversed(server.memory.samples) if each.memory_bytes is not None), 0)
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    needed = server.memory_bytes - held + _SPARE_BYTES
    if free >= needed:
        return None
    return f"filling its limit takes {needed / 2**30:.2f} GiB, and this machine has {free / 2**30:.2f} GiB free"


def _killed_under_load(target: FaultTarget) -> FaultOutcome:
    """Kill the container while it answers: clients must get an error at once, and it must be unhealthy."""
    with _stream(target, max_tokens=_long(target)) as stream:
        stream.recv(256)
        target.container.kill()
        started = time.monotonic()
        stream.settimeout(ANSWER_SECONDS)
        ended = True
        try:
            while stream.recv(65536):
                pass
        except TimeoutError:
            ended = False
        except ConnectionError:
            pass
        seconds = time.monotonic() - started
    unhealthy = not target.is_healthy()
    words = f"clients {'got an error' if ended else 'still waited'} after {seconds:.1f} s"
    return _recovered(target, f"{words}, {'unhealthy' if unhealthy else 'still healthy'}", ok=ended and unhealthy)


def _recovered(target: FaultTarget, words: str, *, ok: bool) -> FaultOutcome:
    """Restart the server, and add whether and when it answered again."""
    started = time.monotonic()
    lost = _lost(target)
    seconds = time.monotonic() - started
    again = lost or f"answers again {seconds:.0f} s after the restart"
    in_time = lost is None and seconds <= target.recovery_s
    return FaultOutcome(f"{words}; {again}", ok=ok and in_time, seconds=seconds, limit_seconds=target.recovery_s)


def _lost(target: FaultTarget) -> str | None:
    """Restart the server; return why it does not recover, or None if it answers again."""
    try:
        target.server.restart()
    except ContainerError as error:
        return f"the server did not recover: {error}"
    if target.answers():
        return None
    failure = target.server.failed()
    return "the server did not recover" if failure is None else f"the server did not recover: it {failure}"


Fault = Callable[[FaultTarget], FaultOutcome]

_GENTLE: tuple[tuple[str, str, Fault], ...] = (
    ("malformed JSON", "HTTP 400 or 422 with a reason", _malformed),
    ("unknown model name", "HTTP 404 with a reason", _unknown_model),
    ("prompt over the context", "HTTP 400 or 413 with a reason", _too_long),
    ("client hangs up", "the next request is answered", _hangs_up),
    ("slow reader", "other requests are answered meanwhile", _slow_reader),
    (
        f"{CONNECTIONS:,} connections at once",
        "each gets an HTTP answer (200, 429 or 503), and it is healthy afterwards",
        _many_connections,
    ),
)
# These need the container; each restarts the server if it died.
_ROUGH: tuple[tuple[str, str, Fault], ...] = (
    ("engine process killed", "it becomes unhealthy; it recovers after a restart", _engine_killed),
    (
        "memory limit hit",
        "its end is reported as out of memory, or it survives; it recovers after a restart",
        _out_of_memory,
    ),
    (
        "container killed under load",
        "clients get an error, it is unhealthy, it recovers after a restart",
        _killed_under_load,
    ),
)


def _long(target: FaultTarget) -> int:
    """The tokens of a long answer."""
    return min(1024, (target.context or 2048) // 2)


def _connect(target: FaultTarget) -> socket.socket:
    place = urlsplit(target.server.url)
    made = socket.create_connection((str(place.hostname), int(place.port or 80)), timeout=ANSWER_SECONDS)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return made


def _payload(target: FaultTarget, **changes: Any) -> bytes:  # noqa: ANN401 - JSON
    body = json.dumps(target.body(**changes)).encode()
    host = urlsplit(target.server.url).netloc
    head = (
        "POST /v1/completions HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join([*head, "", ""]).encode() + body


@contextlib.contextmanager
def _stream(target: FaultTarget, max_tokens: int) -> Iterator[socket.socket]:
    """A connection on which a streamed answer was requested; it is closed at the end."""
    with _connect(target) as connection:
        connection.sendall(_payload(target, max_tokens=max_tokens, stream=True, ignore_eos=True))
        yield connection
