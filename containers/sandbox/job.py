"""One command in a container, to its end: hardened as the sandbox is, without any network, removed whatever happens."""

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

# What a shell says of a process that was killed, as the engine does of a container's.
_KILLED = 128 + 9
# What is kept of a command's output, in bytes: as much as the private engine keeps of a log.
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
    """Run ``command`` in ``folder`` with files and folders of this machine under their own paths; return its status.

    It runs as this process's user, sees ``reads`` and may change ``writes``; what it prints is in the file ``log`` of
    ``folder`` afterwards, whatever the command has left there under that name. A status is negative where a signal
    ended it, the engine's own for want of memory among them.

    Raises:
        SandboxError: it could not be run.
        UntrustedFileError: the command left a folder in the log's place.
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
    """Write what a container printed, up to a limit, into a new file."""
    room = _LOG_BYTES
    with untrusted.create_file(folder, name) as log:
        for chunk in container.logs(stream=True):
            log.write(chunk[:room])
            room -= len(chunk)
            if room <= 0:
                break


def _mounts(reads: Sequence[Path], writes: Sequence[Path]) -> list[tuple[Path, str]]:
    return [*((path, "ro") for path in reads), *((path, "rw") for path in writes)]
