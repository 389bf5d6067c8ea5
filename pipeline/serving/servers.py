"""Starts servers, announces them once they answer, and ends them with all of their child processes.

Dagster is a tree of seven processes; a run that is started from the browser is one more, with its worker below it. This
process is the subreaper of all that it starts: if a process of the tree dies, its children become children of this
process, which can still find and end them.
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
# How long runs may take to end their workers and containers, then servers to close; after that they are killed.
_RUN_SECONDS, _SERVER_SECONDS = 30.0, 15.0
_TAIL_LINES = 5


class ServerProcessError(SlipwayError):
    """A server can't start, or ended unexpectedly."""


@dataclass(frozen=True)
class ServerProcess:
    """A program to run, its log, and the check whether it answers.

    ``ready`` returns whether the server answers, and raises `ServerProcessError` if it answers with an error.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    port: int
    log: Path
    ready: Callable[[], bool]


def run(servers: Sequence[ServerProcess], progress: Progress, announce: Callable[[], None]) -> None:
    """Start the servers, announce them once all of them answer, and serve until SIGINT or SIGTERM.

    Then end them with all that they started, runs first.

    Raises:
        ServerProcessError: a port is taken, or a server ends unexpectedly or does not answer.
    """
    for server in servers:
        _refuse_taken(server)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    not_ours = set(descendants())
    started: list[tuple[ServerProcess, subprocess.Popen[bytes]]] = []
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
        except ServerProcessError:
            # Killed runs are continued at the next start; runs that are asked to end are not.
            for pid in _runs(not_ours):
                _signal(pid, signal.SIGKILL)
            raise
        finally:
            _end([process for _, process in started], not_ours, progress)


def descendants() -> list[int]:
    """The ids of all descendants of this process, parents first."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        # A process may end after it was listed.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if entry.name.isdigit():
                # The name, in brackets, may hold any character; the state and the parent's id follow it.
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents.setdefault(int(parent), []).append(int(entry.name))
    found, level = [], [os.getpid()]
    while level:
        level = [child for parent in level for child in parents.get(parent, [])]
        found += level
    return found


def _start(server: ServerProcess) -> subprocess.Popen[bytes]:
    server.log.parent.mkdir(parents=True, exist_ok=True)
    with server.log.open("wb") as log:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *server.command],
            env=dict(server.environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # In its own process group, so that Ctrl-C reaches it once, through this process.
            process_group=0,
        )


def _refuse_taken(server: ServerProcess) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", server.port))
        except OSError as error:
            raise ServerProcessError(
                f"{server.name} can't use port {server.port} ({error.strerror}): choose another with `--port`"
            ) from error


def _wait_until_ready(started: Sequence[tuple[ServerProcess, subprocess.Popen[bytes]]], progress: Progress) -> None:
    begun = time.monotonic()
    waiting = [server for server, _ in started]
    progress(f"starting {' and '.join(server.name for server in waiting)}")
    while waiting:
        _refuse_ended(started)
        for server in [server for server in waiting if server.ready()]:
            waiting.remove(server)
            progress(f"{server.name} answers after {time.monotonic() - begun:.0f} s")
        if waiting and time.monotonic() - begun > _START_SECONDS:
            raise ServerProcessError(
                f"{waiting[0].name} did not answer within {_START_SECONDS:.0f} s{_last_words(waiting[0])}"
            )
        time.sleep(0.2)


def _refuse_ended(started: Iterable[tuple[ServerProcess, subprocess.Popen[bytes]]]) -> None:
    for server, process in started:
        if process.poll() is not None:
            raise ServerProcessError(f"{server.name} ended with status {process.returncode}{_last_words(server)}")


def _last_words(server: ServerProcess) -> str:
    tail = server.log.read_text(errors="replace").strip().splitlines()[-_TAIL_LINES:]
    return "\n".join([f" (log: {server.log})", *tail])


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Make SIGINT and SIGTERM raise `KeyboardInterrupt`, also if a shell started this in the background.

    A shell makes its background jobs ignore SIGINT, and child processes inherit that; they do not inherit a handler.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _end(roots: Sequence[subprocess.Popen[bytes]], not_ours: set[int], progress: Progress) -> None:
    """End runs first, so that they remove their containers, then servers, then all that is left."""
    runs = _runs(not_ours)
    try:
        if runs:
            progress(f"ending {len(runs)} run(s)")
            _ask(runs)
            _wait_for(lambda: set(runs) & set(descendants()), _RUN_SECONDS)
        _ask([process.pid for process in roots])
        _wait_for(lambda: set(descendants()) - not_ours, _SERVER_SECONDS)
    except KeyboardInterrupt:
        progress("killing what is left")
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
    """Whether Dagster's code server started this process to execute a run."""
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
    """Collect the exit statuses of ended children, including adopted ones."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
