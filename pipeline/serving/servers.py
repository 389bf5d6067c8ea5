"""Servers that this process starts and ends: answered before they are announced, and none of their children left.

Dagster is a tree of seven processes, and a run that the browser starts is one more below them, with its worker.
A tree whose root dies is not lost: this process is the subreaper of all that it starts, so what is orphaned becomes its
own child, and is found.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import SlipwayError
from registry.progress import Progress

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_START_SECONDS = 180.0
# How long runs may take to end their worker and to remove their container; then servers to close; then nobody is asked.
_RUN_SECONDS, _SERVER_SECONDS = 30.0, 15.0
_TAIL_LINES = 5


class ServerError(SlipwayError):
    """A server can't start, or ended by itself."""


@dataclass(frozen=True)
class Server:
    """A program to run, where it writes what it has to say, and how one sees that it answers.

    ``ready`` returns whether it does, and raises `ServerError` where it answers that something is wrong.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    port: int
    log: Path
    ready: Callable[[], bool]


def run(servers: Sequence[Server], progress: Progress, announce: Callable[[], None]) -> None:
    """Start the servers, announce them once all of them answer, and go on until SIGINT or SIGTERM.

    Whatever they started is ended with them, runs first.

    Raises:
        ServerError: a port is taken, or a server ends by itself or does not answer.
    """
    for server in servers:
        _refuse_taken(server)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    not_ours = set(descendants())
    started: list[tuple[Server, subprocess.Popen[bytes]]] = []
    with interrupted_by_signals():
        try:
            for server in servers:
                started.append((server, _start(server)))  # noqa: PERF401 - what has started must end, should one fail
            _wait_until_ready(started, progress)
            announce()
            while True:
                _refuse_ended(started)
                time.sleep(0.5)
        except KeyboardInterrupt:
            progress("ending")
        except ServerError:
            # Nobody sees to these runs any more. Cut off and not asked to end, they are taken up at the next start.
            for pid in _runs(not_ours):
                _signal(pid, signal.SIGKILL)
            raise
        finally:
            _end([process for _, process in started], not_ours, progress)


def descendants() -> list[int]:
    """Every process below this one, parents first."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        # A process may end between being listed and being read.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if entry.name.isdigit():
                # The name, in brackets, may hold anything; behind it are the state and the parent.
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents.setdefault(int(parent), []).append(int(entry.name))
    found, level = [], [os.getpid()]
    while level:
        level = [child for parent in level for child in parents.get(parent, [])]
        found += level
    return found


def _start(server: Server) -> subprocess.Popen[bytes]:
    server.log.parent.mkdir(parents=True, exist_ok=True)
    with server.log.open("wb") as log:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *server.command],
            env=dict(server.environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Apart from the terminal, so that Ctrl-C reaches them once, from here.
            process_group=0,
        )


def _refuse_taken(server: Server) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", server.port))
        except OSError as error:
            raise ServerError(
                f"{server.name} can't have port {server.port} of 127.0.0.1 ({error.strerror}): choose another, `--port`"
            ) from error


def _wait_until_ready(started: Sequence[tuple[Server, subprocess.Popen[bytes]]], progress: Progress) -> None:
    begun = time.monotonic()
    waiting = [server for server, _ in started]
    progress(f"starting {' and '.join(server.name for server in waiting)}")
    while waiting:
        _refuse_ended(started)
        for server in [server for server in waiting if server.ready()]:
            waiting.remove(server)
            progress(f"{server.name} answers after {time.monotonic() - begun:.0f} s")
        if waiting and time.monotonic() - begun > _START_SECONDS:
            raise ServerError(
                f"{waiting[0].name} did not answer within {_START_SECONDS:.0f} s{_last_words(waiting[0])}"
            )
        time.sleep(0.2)


def _refuse_ended(started: Iterable[tuple[Server, subprocess.Popen[bytes]]]) -> None:
    for server, process in started:
        if process.poll() is not None:
            raise ServerError(f"{server.name} ended with status {process.returncode}{_last_words(server)}")


def _last_words(server: Server) -> str:
    tail = server.log.read_text(errors="replace").strip().splitlines()[-_TAIL_LINES:]
    return "\n".join([f" (log: {server.log})", *tail])


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Both signals interrupt, even where a shell started this in the background and made it deaf to SIGINT.

    A child inherits deafness, but no handler: what starts within hears both.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _end(roots: Sequence[subprocess.Popen[bytes]], not_ours: set[int], progress: Progress) -> None:
    """End runs, so that they remove their containers, then servers, then whatever is left."""
    runs = _runs(not_ours)
    try:
        if runs:
            progress(f"ending {len(runs)} run(s)")
            _ask(runs)
            _wait_for(lambda: set(runs) & set(descendants()), _RUN_SECONDS)
        _ask([process.pid for process in roots])
        _wait_for(lambda: set(descendants()) - not_ours, _SERVER_SECONDS)
    except KeyboardInterrupt:
        progress("ending at once")
    finally:
        while left := set(descendants()) - not_ours:
            for pid in left:
                _signal(pid, signal.SIGKILL)
            _reap()
        for process in roots:
            process.wait()


def _runs(not_ours: set[int]) -> list[int]:
    return [pid for pid in descendants() if pid not in not_ours and _is_run(pid)]


def _is_run(pid: int) -> bool:
    """Whether a process is one that Dagster's code server started to carry a run."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"multiprocessing.spawn" in command


def _ask(pids: Sequence[int]) -> None:
    for pid in pids:
        _signal(pid, signal.SIGTERM)


def _wait_for(left: Callable[[], set[int]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left() and time.monotonic() < deadline:
        _reap()
        time.sleep(0.1)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _reap() -> None:
    """Collect what has ended, orphans of ours among it."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
