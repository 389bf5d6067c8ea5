"""Where the files of a source lie: one Protocol, one module for each scheme of URIs, and other distributions' schemes.

A scheme of another distribution is an entry point in the group ``slipway.sources``: its name is the scheme, its object
a callable like `Opener`. Schemes of Slipway itself can't be replaced.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol, cast

from pipeline.errors import SourceError, UnreachableError
from registry import network
from registry.download import InterruptedStreamError, Reader
from registry.errors import PullError, RefusedError, TrackingError

if TYPE_CHECKING:
    from pipeline.settings import Settings

ENTRY_POINTS = "slipway.sources"
# Modules are imported when their scheme is used: most clients take a part of a second.
_OWN = {
    "file": "pipeline.sources.folder:open_folder",
    "hf": "pipeline.sources.hub:open_model",
    "s3": "pipeline.sources.s3:open_prefix",
    "gs": "pipeline.sources.cloud_storage:open_prefix",
    "az": "pipeline.sources.cloud_storage:open_prefix",
    "models": "pipeline.sources.mlflow_models:open_artifacts",
    "runs": "pipeline.sources.mlflow_models:open_artifacts",
    "oci": "pipeline.sources.oci:open_artifact",
}
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Access:
    """Where the services of Slipway's settings are, and as whom they are asked.

    Other clients read the standard variables of their service.
    """

    hub_endpoint: str = "https://huggingface.co"
    hub_token: str | None = field(default=None, repr=False)
    tracking_uri: str = field(default="", repr=False)

    @classmethod
    def of(cls, settings: Settings) -> Access:
        """The access that the settings give."""
        return cls(settings.hub_endpoint, settings.hub_token, settings.tracking_uri)


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, with the digests that the lock or the origin states.

    ``blob`` is git's digest. ``version`` is what the origin needs to find these very bytes again, such as an ETag.
    """

    path: str
    size: int
    sha256: str | None = None
    blob: str | None = None
    version: str | None = None


@dataclass(frozen=True)
class Found:
    """What a source holds now: its files, and the ``revision`` that identifies them.

    It is None where the files' own versions identify them, and for a folder.
    """

    revision: str | None
    files: tuple[SourceFile, ...]


class Origin(Protocol):
    """One source as its scheme reaches it. Nothing that it returns is trusted: names, sizes and digests are checked."""

    @property
    def uri(self) -> str:
        """The source without its revision, as locks and releases record it; it holds no secret."""
        ...

    @property
    def pinned(self) -> str | None:
        """The revision, where the model's file names one that can't move; else None."""
        ...

    def find(self) -> Found:
        """List the files as they are now.

        Raises:
            SourceError: it does not exist, is refused, or can't be reached (`UnreachableError`).
        """
        ...

    def open(
        self, revision: str | None, file: SourceFile, start: int, stop: int | None = None
    ) -> AbstractContextManager[tuple[Reader, int]]:
        """Open a file of a revision at byte ``start``; give the reader, and the byte at which it does start.

        That is 0 where parts can't be read. ``stop`` is the end of what is wanted; more may follow.

        Raises:
            InterruptedStreamError: the connection broke, on opening or reading; it is worth another try.
            SourceError: it is not there, has changed, or is refused.
        """
        ...


Opener = Callable[[str, str | None, Access], Origin]
"""Opens a URI, with the model file's ``revision`` if there is one; ``SourceError`` if they are not valid."""


def open_origin(uri: str, revision: str | None, access: Access) -> Origin:
    """Open a source by the scheme of its URI.

    Raises:
        SourceError: there is no such scheme, or the URI is not valid in it.
    """
    match = _SCHEME.match(uri)
    scheme = match[1] if match else ""
    if scheme in _OWN:
        module, _, name = _OWN[scheme].partition(":")
        return cast("Opener", getattr(importlib.import_module(module), name))(uri, revision, access)
    added = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if scheme not in added:
        known = ", ".join(f"`{name}:`" for name in (*_OWN, *sorted(added.keys() - _OWN.keys())))
        raise SourceError(f"can't pull from `{uri}`: expected a URI that begins with one of {known}")
    try:
        opener = added[scheme].load()
    except Exception as error:  # another distribution's module may raise anything
        raise SourceError(f"the plugin for `{scheme}:` sources ({added[scheme].value}) fails: {error}") from error
    return cast("Origin", opener(uri, revision, access))


def read_range(origin: Origin, revision: str | None, file: SourceFile, start: int, length: int) -> bytes:
    """Read ``length`` bytes of a file from ``start`` on, or fewer at its end, and no more than that.

    Raises:
        SourceError: the origin does not answer, or not with these bytes.
    """
    got, deadline = bytearray(), time.monotonic() + network.ANSWER_SECONDS
    buffer = memoryview(bytearray(min(length, _CHUNK) or 1))
    with explained(origin.uri), origin.open(revision, file, start, start + length) as (reader, begun):
        if begun != start:
            raise SourceError(
                f"{origin.uri} does not support range requests, so {file.path} can't be read in parts: download "
                "the model and plan its folder"
            )
        while len(got) < length and (count := reader.readinto(buffer[: length - len(got)])):
            got += buffer[:count]
            if time.monotonic() > deadline:
                raise UnreachableError(
                    f"{origin.uri} took more than {network.ANSWER_SECONDS:g} s for {length} bytes of {file.path}"
                )
    return bytes(got)


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn errors of reading from a source into a ``SourceError`` that names it."""
    try:
        yield
    except (RefusedError, PullError) as error:
        raise SourceError(f"{uri}: {error}") from error
    except (InterruptedStreamError, TrackingError) as error:
        raise UnreachableError(f"{uri}: {error}; run again: downloaded parts are kept") from error


class Chunks:
    """The `Reader` of a body that comes in pieces of any size."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill the buffer, or some of it; 0 at the end."""
        while not self._left:
            found = next(self._chunks, None)
            if found is None:
                return 0
            self._left = memoryview(found)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count
