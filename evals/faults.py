"""Faults on purpose: what a server must survive, and what it must say.

Each fault is one function that mistreats the server and returns what it saw; what must hold is stated beside it. Those
that end the server come last, and each of them waits until it is back.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import docker
import httpx

from containers.sandbox import SandboxError, Server

Progress = Callable[[str], None]

CONNECTIONS = 1000
# A server that was mistreated, and lives, must answer within this.
ANSWER_SECONDS = 30.0
# One whose engine died must say on /health that it is not healthy, or be gone, within this.
UNHEALTHY_SECONDS = 30.0
_ENGINE_PROCESS = "EngineCore"


@dataclass(frozen=True)
class Fault:
    """One row of the report: what was done, what had to hold, what was seen. ``seconds`` is what the recovery took."""

    name: str
    must: str
    seen: str
    ok: bool
    seconds: float | None = None


@dataclass
class Victim:
    """The server and what is needed to ask it for something."""

    server: Server
    model: str
    context: int | None

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


def inflict(server: Server, model: str, context: int | None, *, progress: Progress) -> list[dict[str, Any]]:
    """Mistreat the server in every way that it can be, and return what each gave.

    Faults that need the container are left out where there is none.
    """
    victim = Victim(server, model, context)
    gentle = [_malformed, _unknown_model, _too_long, _hangs_up, _slow_reader, _crowd]
    rough = [_engine_killed, _out_of_memory, _killed_under_load] if server.container is not None else []
    table: list[dict[str, Any]] = []
    for inflicted in (*gentle, *rough):
        fault = inflicted(victim)
        if fault is None:
            continue
        progress(f"{fault.name}: {'held' if fault.ok else 'DID NOT HOLD'}; {fault.seen}")
        table.append(asdict(fault))
        if server.died() is not None and not _back(victim):
            break
    return table


def _refused(
    victim: Victim, name: str, must: str, allowed: tuple[int, ...], send: Callable[[], httpx.Response]
) -> Fault:
    """A request that is wrong must be refused with the right status and a reason, and harm nobody else."""
    try:
        reply = send()
    except httpx.HTTPError as error:
        return Fault(name, must, f"no HTTP answer: {type(error).__name__}", ok=False)
    try:
        reasoned = "error" in reply.json() or "detail" in reply.json()
    except ValueError:
        reasoned = False
    alive = victim.answers()
    seen = f"HTTP {reply.status_code}, {'with' if reasoned else 'without'} a reason in JSON"
    return Fault(
        name,
        must,
        seen if alive else f"{seen}; afterwards it answers nothing",
        ok=reply.status_code in allowed and reasoned and alive,
    )


def _malformed(victim: Victim) -> Fault:
    headers = {"Content-Type": "application/json"}
    return _refused(
        victim, "malformed JSON", "HTTP 400 or 422 with a reason", (400, 422),
        lambda: httpx.post(victim.url, content=b'{"model": ', headers=headers, timeout=ANSWER_SECONDS, trust_env=False),
    )  # fmt: skip


def _unknown_model(victim: Victim) -> Fault:
    return _refused(
        victim, "unknown model name", "HTTP 404 with a reason", (404,), lambda: victim.ask(model="no-such-model")
    )


def _too_long(victim: Victim) -> Fault:
    words = "import os " * (victim.context or 200_000)
    return _refused(
        victim, "prompt over the context", "HTTP 400 or 413 with a reason", (400, 413), lambda: victim.ask(prompt=words)
    )


def _hangs_up(victim: Victim) -> Fault:
    must = "the next request is answered"
    with _stream(victim, max_tokens=_long(victim)) as stream:
        stream.recv(256)
    started = time.monotonic()
    ok = victim.answers()
    return Fault("client hangs up", must, "it is" if ok else "it is not", ok=ok, seconds=time.monotonic() - started)


def _slow_reader(victim: Victim) -> Fault:
    """Somebody asks and reads nothing; others must not wait for that."""
    must = "others are answered meanwhile"
    with _stream(victim, max_tokens=_long(victim)):
        started = time.monotonic()
        ok = victim.answers()
        seconds = time.monotonic() - started
    return Fault("slow reader", must, f"answered in {seconds:.1f} s" if ok else "they are not", ok=ok, seconds=seconds)


def _crowd(victim: Victim) -> Fault:
    """Open very many connections, have a request on each, and read what comes back."""
    must = "each gets an HTTP answer (200, 429 or 503), and it is healthy afterwards"
    payload = _payload(victim, max_tokens=1)
    gate = threading.Barrier(8)
    answers: list[str] = []

    def sit(count: int) -> None:
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(_connect(victim)) for _ in range(count)]
            gate.wait()
            for each in sockets:
                each.sendall(payload)
            for each in sockets:
                each.settimeout(4 * ANSWER_SECONDS)
                answers.append(each.recv(64).split(b" ")[1].decode())

    errors = []
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(sit, CONNECTIONS // 8) for _ in range(8)]:
            try:
                done.result()
            except (OSError, IndexError, threading.BrokenBarrierError) as error:
                gate.abort()
                errors.append(f"{type(error).__name__}: {error}")
    counts = ", ".join(f"{answers.count(status)} times {status}" for status in sorted(set(answers)))
    ok = len(answers) == CONNECTIONS and set(answers) <= {"200", "429", "503"} and victim.answers()
    return Fault(f"{CONNECTIONS:,} connections at once", must, "; ".join([counts or "no answer", *errors[:1]]), ok=ok)


def _engine_killed(victim: Victim) -> Fault | None:
    """Kill the process that computes, and leave the one that listens."""
    container = victim.server.container
    assert container is not None  # noqa: S101 - `inflict` asked
    script = (
        f'for p in /proc/[0-9]*; do read -r name < $p/comm; case "$name" in *{_ENGINE_PROCESS[:8]}*) '
        "kill -9 ${p#/proc/} && echo killed;; esac; done"
    )
    if b"killed" not in container.exec_run(["sh", "-c", script]).output:
        return None
    started = time.monotonic()
    while victim.is_healthy() and time.monotonic() - started < UNHEALTHY_SECONDS:
        time.sleep(0.1)
    unhealthy = time.monotonic() - started
    said = unhealthy < UNHEALTHY_SECONDS
    seen = f"not healthy after {unhealthy:.1f} s" if said else f"still called healthy after {UNHEALTHY_SECONDS:.0f} s"
    return _recovered(
        victim, Fault("engine process killed", "health turns false; a restart brings it back", seen, ok=said)
    )


def _out_of_memory(victim: Victim) -> Fault | None:
    """Fill the container's memory from within, until the kernel ends what is largest in it.

    Lowering the limit would do, where the kernel took it: cgroup v1 refuses a limit below what is in use.
    """
    container = victim.server.container
    assert container is not None  # noqa: S101 - `inflict` asked
    with contextlib.suppress(docker.errors.APIError):
        if container.exec_run(["tail", "/dev/zero"]).exit_code in {126, 127}:
            return None  # an image without it
    must = "it is told as such, or the server lives on; a restart brings it back"
    started = time.monotonic()
    while time.monotonic() - started < UNHEALTHY_SECONDS:
        died = victim.server.died()
        if died is not None:
            return _recovered(victim, Fault("memory limit hit", must, died, ok="ran out of memory" in died))
        if time.monotonic() - started > 2 and victim.answers():
            return Fault("memory limit hit", must, "another process was ended, the server answers", ok=True)
        time.sleep(0.2)
    return _recovered(victim, Fault("memory limit hit", must, "it runs on and answers nothing", ok=False))


def _killed_under_load(victim: Victim) -> Fault:
    """Kill the container while it answers: clients must get an error and not wait, health must be false at once."""
    container = victim.server.container
    assert container is not None  # noqa: S101 - `inflict` asked
    ended: list[float] = []
    with _stream(victim, max_tokens=_long(victim)) as stream:
        stream.recv(256)
        container.kill()
        started = time.monotonic()
        stream.settimeout(ANSWER_SECONDS)
        with contextlib.suppress(ConnectionError):
            while stream.recv(65536):
                pass
        ended.append(time.monotonic() - started)
    unhealthy = not victim.is_healthy()
    seen = f"clients saw it after {ended[0]:.1f} s, health {'false' if unhealthy else 'still true'}"
    must = "clients see the end, health is false, a restart brings it back"
    return _recovered(victim, Fault("container killed under load", must, seen, ok=unhealthy))


def _recovered(victim: Victim, fault: Fault) -> Fault:
    """Restart the server and add whether, and when, it answered again."""
    started = time.monotonic()
    ok = _back(victim)
    seconds = time.monotonic() - started
    seen = f"{fault.seen}; {f'answers again {seconds:.0f} s after the restart' if ok else 'it does not come back'}"
    return Fault(fault.name, fault.must, seen, ok=fault.ok and ok, seconds=seconds)


def _back(victim: Victim) -> bool:
    try:
        victim.server.restart()
    except SandboxError:
        return False
    return victim.answers()


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
