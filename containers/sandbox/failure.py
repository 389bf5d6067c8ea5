"""How a container failed: its exit status, the kernel's out-of-memory kills, and the first error in its log."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import docker
import requests
from docker.models.containers import Container

from containers.sandbox import engine_log, logs
from containers.sandbox.container import explanation
from containers.sandbox.engine_log import Failure

# 128 and the number of the signal.
_SIGKILLED = 137
# On a busy machine the engine has a container's last lines, and that memory ran out, only after the container's end.
_LATE_SECONDS, _LATE_STEP_SECONDS = 3.0, 0.3


def stopped(container: Container, kept: Path | None) -> Failure | None:
    """Return how a container stopped, and why; None while it runs. Its log is saved in the folder ``kept``."""
    try:
        container.reload()
    except docker.errors.NotFound:
        return Failure("was removed by someone else", may_pass=True)
    except (docker.errors.APIError, requests.RequestException) as error:
        return Failure(
            f"can't be inspected: the container engine does not answer ({explanation(error)})", may_pass=True
        )
    state = container.attrs["State"]
    if state["Running"]:
        return None
    status = state["ExitCode"]
    if state.get("OOMKilled") or (status == _SIGKILLED and _was_killed_for_memory(container)):
        return with_error(container, f"{_out_of_memory(container)}, exit status {status})", kept, explained=True)
    ending, may_pass = engine_log.by_status(status)
    return with_error(container, ending, kept, may_pass=may_pass, calm=status == 0)


def _was_killed_for_memory(container: Container) -> bool:
    """Return whether memory ran out in a container that has ended; the engine can learn of that after the end."""
    deadline = time.monotonic() + _LATE_SECONDS
    try:
        while not _ran_out_of_memory(container):
            if time.monotonic() > deadline:
                return False
            time.sleep(_LATE_STEP_SECONDS)
    except (docker.errors.APIError, requests.RequestException):
        return False
    return True


def failing(container: Container, kept: Path | None) -> Failure | None:
    """Return what is wrong with a running container: a dead engine process, or one killed for lack of memory."""
    try:
        if _ran_out_of_memory(container):
            return with_error(
                container, f"{_out_of_memory(container)}, its other processes still run)", kept, explained=True
            )
        if not engine_log.is_dead(logs.read(container, _started(container))):
            return None
    except (docker.errors.APIError, requests.RequestException):
        return None
    return with_error(container, "failed", kept)


def _out_of_memory(container: Container) -> str:
    return f"ran out of memory (limit {container.attrs['HostConfig']['Memory'] / 2**30:.2f} GiB"


def _ran_out_of_memory(container: Container) -> bool:
    """Return whether the kernel has killed a process of a container for lack of memory since its start.

    The engine's state of a container says so only once the container has stopped.
    """
    assert container.client is not None  # noqa: S101 - it came from one
    filters = {"container": container.id, "event": "oom"}
    until = f"{time.time():.9f}"  # now: with a later time the engine would wait
    since = int(_started(container))
    events = container.client.api.events(since=since, until=until, filters=filters)  # type: ignore[call-overload] # a text
    return any(True for _ in events)


def _started(container: Container) -> float:
    """Return when it was last started, in seconds since 1970: older lines of its log are of an earlier run."""
    try:
        return datetime.fromisoformat(container.attrs["State"]["StartedAt"][:19] + "+00:00").timestamp()
    except ValueError:
        return 0.0


def with_error(
    container: Container, ending: str, kept: Path | None, *, may_pass: bool = False, explained: bool = False,
    calm: bool = False,
) -> Failure:  # fmt: skip
    """Add the first error in the log, unless ``ending`` explains the failure already, and save the log.

    ``calm`` is exit status 0: vLLM's API server exits with it when its engine process has failed.
    """
    if explained:
        return Failure(ending, None, None if kept is None else logs.keep(container, kept))
    wrote = _log(container)
    error = engine_log.root_error(wrote)
    if error is None and not calm:
        time.sleep(_LATE_STEP_SECONDS)
        wrote = _log(container)
        error = engine_log.root_error(wrote)
    log = None if kept is None else logs.keep(container, kept)
    if calm and engine_log.is_dead(wrote):
        ending, calm = "failed", False
    return Failure(ending, error, log, may_pass=calm or (may_pass and error is None))


def _log(container: Container) -> str:
    """Return what it wrote since its last start; nothing if the engine does not say."""
    try:
        return logs.read(container, _started(container))
    except (docker.errors.APIError, requests.RequestException):
        return ""
