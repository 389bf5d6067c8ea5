"""Models in Google Cloud Storage and in Azure's Blob Storage: ``gs://BUCKET/PREFIX`` and ``az://CONTAINER/PREFIX``.

Both are read through fsspec, with the clients of the extras ``gs`` (gcsfs) and ``az`` (adlfs), which take credentials
and addresses from the standard variables and files of their service. An object is held to its generation, to its
version ID or, in a container without versions, to its ETag, which is compared before and after it is read.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import SlipwayError, SourceError, UnreachableError
from pipeline.sources import objects
from pipeline.sources.origin import Access, Found, SourceFile
from registry.download import InterruptedStreamError, Reader

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from fsspec.spec import AbstractBufferedFile

# One request; the next one is sent while the last one's bytes are written.
_BLOCK = 8 << 20
# Addresses in messages of clients may carry a signature.
_QUERY = re.compile(r"\?\S+")


@dataclass(frozen=True)
class Service:
    """One object storage: its client in fsspec, and the property that identifies a version of an object.

    ``mark`` is what the client expects between the path and the version.
    """

    name: str
    bucket: str
    client: str
    package: str
    options: Mapping[str, object]
    version: str
    mark: str
    credentials: str


_SERVICES = {
    "gs": Service(
        "Google Cloud Storage", "BUCKET", "gcsfs.core:GCSFileSystem", "gcsfs",
        {"session_kwargs": {"trust_env": True}}, "generation", "#",
        "GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
    ),
    "az": Service(
        "Azure", "CONTAINER", "adlfs:AzureBlobFileSystem", "adlfs", {}, "version_id", "?versionid=",
        "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and a key, a SAS token or a client secret",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class CloudPrefix:
    """The objects under a prefix, as an `Origin`; those in deeper folders are not part of the model."""

    uri: str
    service: Service
    client: AbstractFileSystem
    place: str
    pinned: None = None

    def find(self) -> Found:
        """List the objects with their versions; ``SourceError`` if the list changes meanwhile."""
        with self._explained():
            return objects.find(self.uri, self._listed, lambda _, file: file)

    @contextmanager
    def open(
        self, _revision: str | None, file: SourceFile, start: int, _stop: int | None = None
    ) -> Iterator[tuple[Reader, int]]:
        """Read the version of an object that was listed."""
        kind, _, version = (file.version or "").partition(":")
        path = f"{self.place}/{file.path}"
        if kind == self.service.version:
            path += self.service.mark + version
        with self._explained(file.path, opened=True):
            self._refuse_other(path, file)
            opened = self.client.open(path, block_size=_BLOCK, cache_type="background", cache_options={"maxblocks": 2})
        with opened:
            opened.seek(start)
            yield _Body(opened, lambda: self._explained(file.path, opened=True)), start
        with self._explained(file.path):  # no second try: all bytes may be here
            self._refuse_other(path, file)

    def _listed(self) -> dict[str, SourceFile]:
        found = self.client.ls(self.place, detail=True)
        files = {str(each["name"]).removeprefix(f"{self.place}/"): each for each in found if each["type"] == "file"}
        return {
            name: SourceFile(name, int(each["size"]), version=self._version(each))
            for name, each in files.items()
            if "/" not in name
        }

    def _version(self, properties: Mapping[str, object]) -> str:
        value = properties.get(self.service.version)
        return f"{self.service.version}:{value}" if value else f"etag:{properties['etag']}"

    def _refuse_other(self, path: str, file: SourceFile) -> None:
        if self._version(self.client.info(path)) != file.version:
            raise objects.overwritten(f"{self.uri}/{file.path}")

    @contextmanager
    def _explained(self, name: str = "", *, opened: bool = False) -> Iterator[None]:
        """Turn an error of a client into one line without credentials."""
        what = f"{self.uri}/{name}".rstrip("/")
        try:
            yield
        except SlipwayError:
            raise
        except FileNotFoundError as error:
            raise objects.overwritten(what) if opened else SourceError(f"{what} does not exist") from error
        except Exception as error:  # these clients pass on what their own libraries raise
            if (refusal := self._refusal(error, what)) is not None:
                raise refusal from error
            if opened:
                raise InterruptedStreamError(_line(error)) from error
            raise UnreachableError(f"{what} can't be reached: {_line(error)}; run again") from error

    def _refusal(self, error: Exception, what: str) -> SourceError | None:
        """Return the error of an answer that another try does not change; None if another try may succeed."""
        status = getattr(error, "status_code", None) or getattr(error, "code", None)
        if (
            status in {401, 403, "401", "403"}
            or str(error).startswith("Forbidden")
            or type(error).__module__.startswith("google.auth")
        ):
            return SourceError(
                f"{what}: {self.service.name} refused the credentials, or they have expired: renew them, or set "
                f"{self.service.credentials}, and run again"
            )
        passes = status is not None and (str(status).startswith("5") or str(status) in {"408", "429"})
        if passes or (status is None and not isinstance(error, ValueError)):
            return None
        return SourceError(f"{what} can't be read: {_line(error)}")


class _Body:
    """A `Reader` of an opened object, whose errors are explained."""

    def __init__(self, opened: AbstractBufferedFile, explained: Callable[[], AbstractContextManager[None]]) -> None:
        self._opened, self._explained = opened, explained

    def readinto(self, buffer: memoryview, /) -> int:
        with self._explained():
            return int(self._opened.readinto(buffer))


def _line(error: Exception) -> str:
    return _QUERY.sub("", " ".join(str(error).split()))[:300] or type(error).__name__


def open_prefix(uri: str, revision: str | None, _access: Access) -> CloudPrefix:
    """Open ``gs://BUCKET/PREFIX`` or ``az://CONTAINER/PREFIX``."""
    scheme = uri.partition(":")[0]
    service = _SERVICES[scheme]
    bucket, prefix = objects.split(uri, revision, service.bucket)
    place = f"{bucket}/{prefix}".rstrip("/")
    module, _, name = service.client.partition(":")
    try:
        client = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise SourceError(
            f"`{scheme}://` needs {service.package}: install `slipway[{scheme}]`, in a checkout with `uv pip install "
            f"--require-hashes -r requirements/{scheme}.txt`"
        ) from error
    for logger in ("gcsfs", "google.auth"):  # they print errors that they also raise, or try again
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    placed = CloudPrefix(f"{scheme}://{place}", service, None, place)
    with placed._explained():  # noqa: SLF001 - of this module
        files = client(version_aware=True, use_listings_cache=False, skip_instance_cache=True, **service.options)
    return CloudPrefix(placed.uri, service, files, place)
