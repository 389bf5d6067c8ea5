"""Containers that are hardened alike: created, started and removed with errors that say what the engine answered."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import docker
import requests
from docker.models.containers import Container

from containers.errors import SandboxError

USER = "65534:65534"
PROCESSES = 1024
# Of each rank of an engine: its queues to the other ranks, and NCCL's buffers. vLLM 0.32 with two ranks on a CPU used
# 8 MiB of it while idle.
SHARED_MEMORY_BYTES = 2**30
_KILLED_SECONDS = 60.0
_PAUSE_SECONDS = 0.2
_NOT_ENDED = "could not kill"  # Docker 20.10: "Could not kill running container"; 28: "…: could not kill: …"


def hardening(memory_bytes: int, ranks: int = 1) -> dict[str, Any]:
    """Return the limits of every container that runs an image, as options of the Docker SDK."""
    return {
        "read_only": True,
        "tmpfs": {"/tmp": "rw,exec,nosuid,nodev,mode=1777"},  # noqa: S108 - inside the container
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "user": USER,
        "pids_limit": PROCESSES,
        "mem_limit": memory_bytes,
        "memswap_limit": memory_bytes,
        "shm_size": ranks * SHARED_MEMORY_BYTES,
    }


@contextlib.contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """Raise errors of the engine as SandboxError, with ``what`` failed in front."""
    try:
        yield
    except (docker.errors.APIError, requests.RequestException) as error:
        raise SandboxError(f"{what}: {explanation(error)}") from error


def create(client: docker.DockerClient, image: str, options: dict[str, Any]) -> Container:
    """Create a container.

    Raises:
        SandboxError: the engine refuses, or has no such image.
    """
    try:
        with engine_errors(f"can't create a container of {image}"):
            return client.containers.create(image, **options)
    except SandboxError as error:
        if isinstance(error.__cause__, docker.errors.ImageNotFound):
            raise SandboxError(f"the container engine has no image {image}: build it again") from error
        raise


def explanation(error: Exception) -> str:
    """Return what the engine said of an error."""
    return str(getattr(error, "explanation", None) or error)


def remove(container: Container) -> None:
    """Remove a container with its volumes; one that is already gone, or being removed, is no error.

    An engine gives up after some seconds on a killed process that hasn't ended, as a large one on a busy machine.

    Raises:
        SandboxError: the engine refuses, or the processes have not ended after a minute.
    """
    try:
        until_gone(
            lambda: container.remove(force=True, v=True), lambda said: _NOT_ENDED in said.lower(), _KILLED_SECONDS
        )
    except docker.errors.APIError as error:
        if "is already in progress" not in explanation(error):
            raise SandboxError(f"can't remove the container {container.name}: {explanation(error)}") from error


def until_gone(attempt: Callable[[], object], may_pass: Callable[[str], bool], seconds: float) -> None:
    """Remove something from the engine, again and again while what it says may pass; what is gone already is no error.

    Raises:
        APIError: the engine refuses for another reason, or after so many seconds still.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            attempt()
        except docker.errors.NotFound:
            return
        except docker.errors.APIError as error:
            if not may_pass(explanation(error)) or time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_SECONDS)
        else:
            return


@contextlib.contextmanager
def terminated_by_exception() -> Iterator[None]:
    """Make SIGTERM unwind the stack during the block, so that containers and networks are removed.

    Works only in the main thread, as Python allows it there alone, and leaves an existing handler in place.
    """
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not ours:
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
