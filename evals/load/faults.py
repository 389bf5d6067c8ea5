"""Faults on purpose: what a server must survive, and what it must say.

Each fault is one function that mistreats the server and returns what it saw; what must hold is stated beside it, at the
end. Those that end the server come last, and each of them waits until it is back.
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
from registry.progress import Progress

CONNECTIONS = 1000
# A server that was mistreated, and lives, must answer within this.
ANSWER_SECONDS = 30.0
# One whose engine died must say on /health that it is not healthy, or be gone, within this.
UNHEALTHY_SECONDS = 30.0
_ENGINE_PROCESS = "EngineCore"
_CROWD_THREADS = 8
# Files that this process has open beside the crowd's connections.
_OTHER_FILES = 256
_MEMINFO = Path("/proc/meminfo")
# What this machine keeps free while a container's memory is filled.
_SPARE_BYTES = 256 << 20


@dataclass(frozen=True)
class Seen:
    """What a fault showed, in words, and whether what had to hold held: None where it could not be inflicted.

    ``seconds`` is what the recovery took, ``limit_seconds`` what it may take.
    """

    words: str
    ok: bool | None
    seconds: float | None = None
    limit_seconds: float | None = None


@dataclass
class Victim:
    """The server and what is needed to ask it for something."""

    server: Server
    model: str
    context: int | None
    recovery_s: float

    @property
    def container(self) -> Container:
        """The server's container; faults that need one are inflicted on no other server."""
        assert self.server.container is not None  # noqa: S101 - `inflict` asked
        return self.server.container

    @property
    def url(self) -> str:
        """Where completions are asked for; a restart may have moved it."""
        return f"{self.server.url}/v1/completions"

    def body(self, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        """A small request, and what is wrong with it."""
        return {"model": self.model, "prompt": "import", "max_tokens": 4, "temperature": 0, **changes}

    def answers(self) -> bool:
        """Whether it is healthy and answers a small request in time."""
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
        """What ``/health`` says; no answer is no health."""
        try:
            return httpx.get(f"{self.server.url}/health", timeout=5, trust_env=False).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False


def inflict(
    server: Server, model: str, context: int | None, *, recovery_s: float, progress: Progress
) -> list[dict[str, Any]]:
    """Mistreat the server in every way there is; return a row for each: what was done, what had to hold, what was seen.

    ``ok`` is None in the row of a fault that could not be inflicted, and its words say why. A fault that ends in an
    error of the network or of the engine did not hold. ``recovery_s`` is what the server may take from a restart to its
    next answer.
    """
    victim = Victim(server, model, context, recovery_s)
    table: list[dict[str, Any]] = []
    gone = False
    for name, must, mistreat in (*_GENTLE, *_ROUGH):
        if gone:
            seen = _left_out("the server did not come back from the one before")
        elif server.container is None and (name, must, mistreat) in _ROUGH:
            seen = _left_out("the server is in no container of ours")
        else:
            seen = _tried(mistreat, victim)
            gone = server.died() is not None and _lost(victim) is not None
        told = "NOT INFLICTED" if seen.ok is None else "held" if seen.ok else "DID NOT HOLD"
        progress(f"{name}: {told}; {seen.words}")
        table.append({
            "name": name, "must": must, "seen": seen.words, "ok": seen.ok, "seconds": seen.seconds,
            "limit_seconds": seen.limit_seconds,
        })  # fmt: skip
    return table


def _tried(mistreat: Mistreat, victim: Victim) -> Seen:
    try:
        return mistreat(victim)
    except (OSError, httpx.HTTPError, docker.errors.DockerException, ContainerError) as error:
        return Seen(f"it ended in an error: {type(error).__name__}: {error}", ok=False)


def _left_out(why: str) -> Seen:
    return Seen(f"not inflicted: {why}", ok=None)


def _refused(victim: Victim, allowed: tuple[int, ...], send: Callable[[], httpx.Response]) -> Seen:
    """A request that is wrong must be refused with the right status and a reason, and harm nobody else."""
    try:
        reply = send()
    except httpx.HTTPError as error:
        return Seen(f"no HTTP answer: {type(error).__name__}", ok=False)
    try:
        reasoned = "error" in reply.json() or "detail" in reply.json()
    except ValueError:
        reasoned = False
    alive = victim.answers()
    words = f"HTTP {reply.status_code}, {'with' if reasoned else 'without'} a reason in JSON"
    return Seen(
        words if alive else f"{words}; afterwards it answers nothing",
        ok=reply.status_code in allowed and reasoned and alive,
    )


def _malformed(victim: Victim) -> Seen:
    headers = {"Content-Type": "application/json"}
    return _refused(
        victim, (400, 422),
        lambda: httpx.post(victim.url, content=b'{"model": ', headers=headers, timeout=ANSWER_SECONDS, trust_env=False),
    )  # fmt: skip


def _unknown_model(victim: Victim) -> Seen:
    return _refused(victim, (404,), lambda: victim.ask(model="no-such-model"))


def _too_long(victim: Victim) -> Seen:
    words = "import os " * (victim.context or 200_000)
    return _refused(victim, (400, 413), lambda: victim.ask(prompt=words))


def _hangs_up(victim: Victim) -> Seen:
    with _stream(victim, max_tokens=_long(victim)) as stream:
        stream.recv(256)
    return _others(victim)


def _slow_reader(victim: Victim) -> Seen:
    """Somebody asks and reads nothing; others must not wait for that."""
    with _stream(victim, max_tokens=_long(victim)):
        return _others(victim)


def _others(victim: Victim) -> Seen:
    """Whether, and when, somebody else is answered."""
    started = time.monotonic()
    ok = victim.answers()
    seconds = time.monotonic() - started
    words = f"answered in {seconds:.1f} s" if ok else f"no answer in {ANSWER_SECONDS:.0f} s"
    return Seen(words, ok=ok, seconds=seconds, limit_seconds=ANSWER_SECONDS)


def _crowd(victim: Victim) -> Seen:
    """Open very many connections, have a request on each, and read what comes back."""
    payload = _payload(victim, max_tokens=1)
    gate = threading.Barrier(_CROWD_THREADS, timeout=4 * ANSWER_SECONDS)
    answers: list[str] = []

    def sit(count: int) -> None:
        with contextlib.ExitStack() as stack:
            try:
                sockets = [stack.enter_context(_connect(victim)) for _ in range(count)]
            except OSError:
                gate.abort()  # else the other threads would wait for this one
                raise
            gate.wait()
            for each in sockets:
                each.sendall(payload)
            for each in sockets:
                each.settimeout(4 * ANSWER_SECONDS)
                answers.append(each.recv(64).split(b" ")[1].decode())

    errors = []
    with _open_files(CONNECTIONS + _OTHER_FILES) as most, ThreadPoolExecutor(_CROWD_THREADS) as pool:
        if most < CONNECTIONS + _OTHER_FILES:
            return _left_out(f"this machine lets a process open {most} files (`ulimit -Hn`)")
        for done in [pool.submit(sit, CONNECTIONS // _CROWD_THREADS) for _ in range(_CROWD_THREADS)]:
            try:
                done.result()
            except threading.BrokenBarrierError:
                errors.append("not all connections could be opened")
            except (OSError, IndexError) as error:
                errors.insert(0, f"{type(error).__name__}: {error}")
    counts = ", ".join(f"{answers.count(status)} times {status}" for status in sorted(set(answers)))
    ok = len(answers) == CONNECTIONS and set(answers) <= {"200", "429", "503"} and victim.answers()
    return Seen("; ".join([counts or "no answer", *errors[:1]]), ok=ok)


@contextlib.contextmanager
def _open_files(wanted: int) -> Iterator[int]:
    """Let this process open so many files for a while, as far as it may; gives how many it then may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(soft, wanted if hard == resource.RLIM_INFINITY else min(wanted, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _engine_killed(victim: Victim) -> Seen:
    """Kill the process that computes, and leave the one that listens."""
    script = (
        f'for p in /proc/[0-9]*; do read -r name < $p/comm; case "$name" in *{_ENGINE_PROCESS[:8]}*) '
        "kill -9 ${p#/proc/} && echo killed;; esac; done"
    )
    if b"killed" not in victim.container.exec_run(["sh", "-c", script]).output:
        return _left_out(f"no process of the container is called {_ENGINE_PROCESS}, or it has no shell to kill it")
    started = time.monotonic()
    while victim.is_healthy() and time.monotonic() - started < UNHEALTHY_SECONDS:
        time.sleep(0.1)
    unhealthy = time.monotonic() - started
    said = unhealthy < UNHEALTHY_SECONDS
    words = f"not healthy after {unhealthy:.1f} s" if said else f"still called healthy after {UNHEALTHY_SECONDS:.0f} s"
    return _recovered(victim, words, ok=said)


def _out_of_memory(victim: Victim) -> Seen:
    """Fill the container's memory from within, until the kernel ends what is largest in it.

    Lowering the limit would do, where the kernel took it: cgroup v1 refuses a limit below what is in use.
    """
    lacking = _memory_lacking(victim.server)
    if lacking is not None:
        return _left_out(lacking)
    with contextlib.suppress(docker.errors.APIError):
        if victim.container.exec_run(["tail", "/dev/zero"]).exit_code in {126, 127}:
            return _left_out("the image has no `tail` to fill the memory with")
    started = time.monotonic()
    while time.monotonic() - started < UNHEALTHY_SECONDS:
        died = victim.server.died()
        if died is not None:
            return _recovered(victim, str(died), ok="ran out of memory" in died.ending)
        if time.monotonic() - started > 2 and victim.answers():
            return Seen("another process was ended, the server answers", ok=True)
        time.sleep(0.2)
    return _recovered(victim, "it runs on and answers nothing", ok=False)


def _memory_lacking(server: Server) -> str | None:
    """Say that this machine would run out of memory before the container does; None where it has enough.

    A machine whose cgroups can't be seen is another one, of whose memory nothing is known here.
    """
    if not server.memory.source.startswith("cgroup"):
        return "the container is on another machine, whose free memory can't be seen"
    held = next((each["memory_bytes"] for each in reversed(server.memory.samples) if "memory_bytes" in each), 0)
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    needed = server.memory_bytes - held + _SPARE_BYTES
    if free >= needed:
        return None
    return f"filling its limit takes {needed / 2**30:.2f} GiB, and this machine has {free / 2**30:.2f} GiB free"


def _killed_under_load(victim: Victim) -> Seen:
    """Kill the container while it answers: clients must get an error and not wait, health must be false at once."""
    with _stream(victim, max_tokens=_long(victim)) as stream:
        stream.recv(256)
        victim.container.kill()
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
    unhealthy = not victim.is_healthy()
    words = f"clients {'saw it' if ended else 'did not see it'} after {seconds:.1f} s"
    return _recovered(victim, f"{words}, health {'false' if unhealthy else 'still true'}", ok=ended and unhealthy)


def _recovered(victim: Victim, words: str, *, ok: bool) -> Seen:
    """Restart the server and add whether, and when, it answered again."""
    started = time.monotonic()
    lost = _lost(victim)
    seconds = time.monotonic() - started
    again = lost or f"answers again {seconds:.0f} s after the restart"
    in_time = lost is None and seconds <= victim.recovery_s
    return Seen(f"{words}; {again}", ok=ok and in_time, seconds=seconds, limit_seconds=victim.recovery_s)


def _lost(victim: Victim) -> str | None:
    """Restart the server; say that it does not come back, and why, or None where it answers again."""
    try:
        victim.server.restart()
    except ContainerError as error:
        return f"it does not come back: {error}"
    if victim.answers():
        return None
    failure = victim.server.failed()
    return "it does not come back" if failure is None else f"it does not come back: the server {failure}"


Mistreat = Callable[[Victim], Seen]

_GENTLE: tuple[tuple[str, str, Mistreat], ...] = (
    ("malformed JSON", "HTTP 400 or 422 with a reason", _malformed),
    ("unknown model name", "HTTP 404 with a reason", _unknown_model),
    ("prompt over the context", "HTTP 400 or 413 with a reason", _too_long),
    ("client hangs up", "the next request is answered", _hangs_up),
    ("slow reader", "others are answered meanwhile", _slow_reader),
    (
        f"{CONNECTIONS:,} connections at once",
        "each gets an HTTP answer (200, 429 or 503), and it is healthy afterwards",
        _crowd,
    ),
)
# These need the container; each ends in a restart, where the server died of it.
_ROUGH: tuple[tuple[str, str, Mistreat], ...] = (
    ("engine process killed", "health turns false; a restart brings it back", _engine_killed),
    (
        "memory limit hit",
        "it is told as such, or the server lives on; a restart brings it back",
        _out_of_memory,
    ),
    (
        "container killed under load",
        "clients see the end, health is false, a restart brings it back",
        _killed_under_load,
    ),
)


def _long(victim: Victim) -> int:
    """Tokens of an answer that takes a while."""
    return min(1024, (victim.context or 2048) // 2)


def _connect(victim: Victim) -> socket.socket:
    place = urlsplit(victim.server.url)
    made = socket.create_connection((str(place.hostname), int(place.port or 80)), timeout=ANSWER_SECONDS)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return made


def _payload(victim: Victim, **changes: Any) -> bytes:  # noqa: ANN401 - JSON
    body = json.dumps(victim.body(**changes)).encode()
    host = urlsplit(victim.server.url).netloc
    head = (
        "POST /v1/completions HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join([*head, "", ""]).encode() + body


@contextlib.contextmanager
def _stream(victim: Victim, max_tokens: int) -> Iterator[socket.socket]:
    """A connection on which a streamed answer has been asked for; closed at the end, whatever came."""
    with _connect(victim) as connection:
        connection.sendall(_payload(victim, max_tokens=max_tokens, stream=True, ignore_eos=True))
        yield connection
