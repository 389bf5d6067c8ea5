"""The files of a registered version, wherever they are kept: listed, and opened from any byte on.

A folder of this machine is read directly; what an MLflow server hands out comes by its REST API, or, where it can say
where, straight from the object store behind it; S3 is read by presigned address. For every other store MLflow fetches.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

from registry import untrusted
from registry.cold_files import MARKER, cold_files
from registry.download import CHUNK, InterruptedStreamError, Open, Reader, keep, local, pause
from registry.errors import PullError, TrackingError
from registry.locations import checked
from registry.network import MLFLOW_AUTHORITIES, Pace
from registry.tracking import connected, local_folder
from registry.walk import entries

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

    from registry.server import MlflowServer

# No release has more, see `registry.manifest.BOUNDS`.
_MOST_ENTRIES, _MOST_DEPTH = 20_000, 16
_LIST_SECONDS = 300.0


class Artifacts(Protocol):
    """Read-only access to one version's files, by their paths in the release."""

    def names(self) -> list[str]:
        """List every file."""
        ...

    def open(self, name: str, start: int = 0) -> AbstractContextManager[tuple[Reader, int]]:
        """Read the file from a byte on, as `registry.download.Open` has it."""
        ...


@contextmanager
def open_artifacts(location: str, tracking_uri: str) -> Iterator[Artifacts]:
    """Open what is at ``location``, a version's.

    Raises:
        PullError: The registry keeps no files there (`registry.locations`).
        TrackingError: It can't be reached.
    """
    location = checked(location, tracking_uri)
    folder, parts = local_folder(location), urlsplit(location)
    if folder is not None:
        yield LocalArtifacts(folder)
    elif parts.scheme == "mlflow-artifacts" and urlsplit(tracking_uri).scheme in ("http", "https"):
        from registry.server import MlflowServer  # noqa: PLC0415 - its HTTP client, for those who have a server

        with MlflowServer(tracking_uri) as server:
            yield ServerArtifacts(server, unquote(parts.path).strip("/"))
    elif parts.scheme == "s3":
        from registry.s3 import S3Artifacts  # noqa: PLC0415 - boto3, for those who have S3

        with S3Artifacts.opened(parts.netloc, unquote(parts.path).strip("/")) as stored:
            yield stored
    else:
        with connected(tracking_uri):
            yield MlflowArtifacts(location)


def fetch(stored: Artifacts, name: str, folder: Path, limit: int) -> Path:
    """Write a small file to ``folder / name`` and return that path.

    Raises:
        TrackingError: It can't be read, or has more than ``limit`` bytes.
    """
    data = bytearray()
    for chunk in _chunks(stored, name):
        data += chunk
        if len(data) > limit:
            raise TrackingError(f"`{name}` is larger than {limit} bytes: no such file is")
    with untrusted.create_file(folder, name) as stream:
        stream.write(data)
    return folder / name


def sha256(stored: Artifacts, name: str) -> str:
    """Return the SHA-256 of the stored bytes, in hexadecimal; empty where it is a link.

    Raises:
        TrackingError: They can't be read now, which says nothing about what they are.
    """
    total = hashlib.sha256()
    try:
        for chunk in _chunks(stored, name):
            total.update(chunk)
    except PullError:
        return ""
    return total.hexdigest()


def _chunks(stored: Artifacts, name: str) -> Iterator[memoryview]:
    """Read a file to its end; where it breaks off it is opened anew, from there on."""
    buffer = memoryview(bytearray(CHUNK))
    at, attempt, pace = 0, 1, Pace()
    while True:
        before = at
        try:
            with stored.open(name, at) as (reader, start):
                again = at - start  # where the other side knows no ranges
                while count := reader.readinto(buffer):
                    new = buffer[min(again, count) : count]
                    again -= count - len(new)
                    at += len(new)
                    keep(pace, name, count)
                    yield new
                return
        except InterruptedStreamError as error:
            why = str(error)
        attempt = 1 if at > before else attempt + 1
        pause(name, attempt, why)


def _walked(listed: Callable[[str], Iterator[tuple[str, bool]]]) -> list[str]:
    """List every file below a version's folder, ``""``; ``listed`` gives the paths in one and what is a folder.

    Raises:
        TrackingError: There are more, or deeper ones, than any release has: a listing without end.
    """
    found: list[str] = []
    folders, seen, deadline = [""], 0, time.monotonic() + _LIST_SECONDS
    while folders:
        for path, is_folder in listed(folders.pop()):
            seen += 1
            if seen > _MOST_ENTRIES or path.count("/") >= _MOST_DEPTH or time.monotonic() > deadline:
                raise TrackingError(
                    f"the version's files are listed without end: stopped after {seen}, at `{path[:100]}`"
                )
            (folders if is_folder else found).append(path)
    return sorted(found)


def _unlisted(name: str, why: str) -> None:
    raise PullError(f"`{name}` in the registered version's folder: {why}")


class LocalArtifacts:
    """Files in a folder of this machine; those that are cold (`registry.tiers`) come from where they are kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """List every file and link, and what is cold."""
        # Asked before and after: whichever way a file moves meanwhile, it is in one of the three.
        before = self._cold()
        # An upload that was killed at its start has left no folder.
        here = {name for name, _ in entries(self._folder, _unlisted)} if self._folder.is_dir() else set()
        return sorted(here | before.keys() | self._cold().keys())

    @contextmanager
    def open(self, name: str, start: int = 0) -> Iterator[tuple[Reader, int]]:
        """Read the file where it is; ``TrackingError`` where it is a link, or can't be read."""
        with ExitStack() as stack:
            try:
                opened = stack.enter_context(local(self._folder / name, start))
            except TrackingError:
                cold = self._cold()
                if name in cold:
                    opened = stack.enter_context(cold[name](start))
                else:  # it may be back by now
                    opened = stack.enter_context(local(self._folder / name, start))
            yield opened

    def _cold(self) -> Mapping[str, Open]:
        """What opens each cold file."""
        if not (self._folder.parent / MARKER).exists():
            return {}
        from registry.objects import ObjectStore  # noqa: PLC0415 - for those who have a cold tier

        uri, files = cold_files(self._folder)
        if not files:
            return {}
        store = ObjectStore.opened(uri)
        return {name: partial(store.open, record.sha256) for name, record in files.items()}


class ServerArtifacts:
    """Files that an MLflow server keeps, at ``root`` of its artifact store."""

    def __init__(self, server: MlflowServer, root: str) -> None:
        self._server, self._root = server, root
        self._direct = True

    def names(self) -> list[str]:
        """List every file, folder by folder."""

        def listed(folder: str) -> Iterator[tuple[str, bool]]:
            for entry in self._server.list_proxied(f"{self._root}/{folder}".rstrip("/")):
                yield f"{folder}/{entry['path']}".lstrip("/"), entry["is_dir"]

        return _walked(listed)

    @contextmanager
    def open(self, name: str, start: int = 0) -> Iterator[tuple[Reader, int]]:
        """Read from the object store behind the server, where it says where that is; else through the server."""
        from registry.stream import stream  # noqa: PLC0415 - its HTTP client, for those who have a server

        path = f"{self._root}/{name}"
        with ExitStack() as stack:
            opened = None
            direct = self._server.presigned(path) if self._direct else None
            if direct is not None:
                with suppress(
                    InterruptedStreamError, TrackingError
                ):  # a store that is out of reach from here: the server reaches it
                    opened = stack.enter_context(stream(*direct, start))
            if opened is None:
                self._direct = False
                proxied = stream(self._server.proxied(path), self._server.headers, start, MLFLOW_AUTHORITIES)
                opened = stack.enter_context(proxied)
            yield opened


class MlflowArtifacts:
    """Files in any other store, reached as MLflow reaches them: whole files only, by way of a temporary one."""

    def __init__(self, location: str) -> None:
        from mlflow.store.artifact.artifact_repository_registry import (  # noqa: PLC0415 - slow, see `connected`
            get_artifact_repository,
        )

        self._repository: ArtifactRepository = get_artifact_repository(location)

    def names(self) -> list[str]:
        """List every file, folder by folder."""

        def listed(folder: str) -> Iterator[tuple[str, bool]]:
            for entry in self._repository.list_artifacts(folder or None):
                yield entry.path, entry.is_dir

        return _walked(listed)

    @contextmanager
    def open(self, name: str, start: int = 0) -> Iterator[tuple[Reader, int]]:
        """Download the file, and read that; an ``MlflowException`` becomes a ``TrackingError`` in `connected`."""
        with tempfile.TemporaryDirectory(prefix="slipway-") as folder:
            self._repository.download_artifacts(name, folder)
            with local(Path(folder) / name, start) as opened:
                yield opened
