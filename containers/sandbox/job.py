"""Runs one command in a hardened container without a network, and removes the container afterwards."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import docker
from docker.models.containers import Container
from docker.types import DeviceRequest

from containers.engine.owner import marked, ownership
from containers.sandbox.container import create, engine_errors, hardening, remove, terminated_by_exception
from registry import untrusted

# The exit status that an engine reports for a container that was killed.
_KILLED = 128 + 9
# The most bytes kept of a command's output; the private engine keeps as much of a log.
_LOG_BYTES = 64 << 20


def run(
    client: docker.DockerClient,
    image: str,
    command: Sequence[str],
    *,
    name: str,
    home: Path,
    folder: Path,
    reads: Sequence[Path],
    writes: Sequence[Path],
    environment: Mapping[str, str],
    log: str,
    memory_bytes: int,
    gpus: int = 0,
) -> int:
    """Run ``command`` in ``folder``, with this machine's files under their own paths, and return its exit status.

    It runs as this process's user, can read ``reads`` and change ``writes``. Its output is written to the file ``log``
    in ``folder`` afterwards and replaces any file of that name. The status is negative if a signal ended the command,
    the kernel's out-of-memory kill included.

    Raises:
        SandboxError: it could not be run.
        UntrustedFileError: the command left a folder in place of the log.
    """
    volumes = {str(path.resolve()): {"bind": str(path), "mode": mode} for path, mode in _mounts(reads, writes)}
    options = {
        **hardening(memory_bytes),
        "name": f"{name}-{uuid.uuid4().hex[:8]}",
        "command": list(command),
        "working_dir": str(folder),
        "environment": dict(environment),
        "volumes": volumes,
        "user": f"{os.getuid()}:{os.getgid()}",
        "network_mode": "none",
        "init": True,
        "labels": ownership(home),
        "device_requests": [DeviceRequest(count=gpus, capabilities=[["gpu"]])] if gpus else None,
    }
    with terminated_by_exception(), marked(home, str(options["name"])):
        container = create(client, image, options)
        try:
            with engine_errors(f"can't run a container of {image}"):
                container.start()
                status = int(container.wait()["StatusCode"])
                _keep_log(container, folder, log)
        finally:
            remove(container)
    return -9 if status == _KILLED else status


def _keep_log(container: Container, folder: Path, name: str) -> None:
    """Write a container's output, up to `_LOG_BYTES`, into a new file."""
    room = _LOG_BYTES
    with untrusted.create_file(folder, name) as log:
        for chunk in container.logs(stream=True):
            log.write(chunk[:room])
            room -= len(chunk)
            if room <= 0:
                break


def _mounts(reads: Sequence[Path], writes: Sequence[Path]) -> list[tuple[Path, str]]:
    return [*((path, "ro") for path in reads), *((path, "rw") for path in writes)]
