"""Models in a container registry: ``oci://HOST/NAME:TAG`` or ``oci://HOST/NAME@sha256:…``.

Three kinds of artifacts are read: files as ORAS pushes them, ModelPack, and KServe's ModelCar, an image with the model
under ``/models``. A tag is resolved to the digest of its manifest. Files of uncompressed archives are read in place,
after their headers; compressed layers are not read, because parts of them can't be. The client, with its credentials,
is that of container images (`containers.image.distribution`).
"""

from __future__ import annotations

import io
import re
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from containers.image.distribution import DOCUMENT, DistributionError, NoAnswerError, Registry
from containers.image.oci import INDEX
from pipeline.errors import SourceError, UnreachableError
from pipeline.sources.origin import Access, Chunks, Found, SourceFile
from registry.bounded_json import DocumentError, read_json
from registry.digests import digest_of
from registry.download import InterruptedStreamError, Reader

_URI = re.compile(
    r"oci://(?P<host>[A-Za-z0-9.-]+(?::\d{1,5})?|\[[0-9a-f:]+\](?::\d{1,5})?)"
    r"/(?P<repository>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_TITLE = "org.opencontainers.image.title"
# ORAS sets it for a folder, which it packs.
_UNPACK = "io.deis.oras.content.unpack"
# ModelPack, under its name and under the one that it had before.
_FILE_PATHS = ("org.cncf.model.filepath", "org.cnai.model.filepath")
_PLATFORM = {"os": "linux", "architecture": "amd64"}
# Where KServe has the model.
_MODELS = "models"
_MOST_LAYERS, _MOST_MEMBERS, _LIST_SECONDS = 1000, 20_000, 300.0
# Headers of small files in a row are read by one request.
_HEADERS = 64 * 1024


@dataclass(frozen=True)
class Layer:
    """A layer of a manifest, checked."""

    digest: str
    size: int
    kind: str
    annotations: Mapping[str, str]

    @property
    def path(self) -> str | None:
        """The name of the file that the layer is; None for an archive."""
        if self.annotations.get(_UNPACK) == "true" or self.is_compressed:
            return None
        for key in _FILE_PATHS:
            if key in self.annotations:
                return None if ".tar" in self.kind else self.annotations[key]
        return self.annotations.get(_TITLE)

    @property
    def is_compressed(self) -> bool:
        """Whether parts of it can't be read."""
        return self.kind.endswith(("gzip", "zstd"))


@dataclass(frozen=True)
class OciArtifact:
    """The files of an artifact in a registry, as an `Origin`.

    A file's ``version`` is ``DIGEST:OFFSET``, its place in a layer, or the layer's digest if it is all of the layer.
    """

    host: str
    repository: str
    tag: str | None
    pinned: str | None

    @property
    def uri(self) -> str:
        """The artifact, with its tag if no digest is given."""
        return f"oci://{self.host}/{self.repository}" + (f":{self.tag}" if self.tag and not self.pinned else "")

    def find(self) -> Found:
        """Resolve the tag, and list the files of all layers."""
        with Registry(self.host) as registry, self._explained():
            digest, layers = self._layers(registry, self.pinned or str(self.tag))
            files: dict[str, SourceFile] = {}  # a file of a later layer replaces that of an earlier one
            for layer in layers:
                files |= {file.path: file for file in self._files(registry, layer)}
        packed = sum(layer.is_compressed for layer in layers)
        if packed and not any(name.endswith(".safetensors") for name in files):
            raise SourceError(
                f"{self.uri} has no safetensors outside of its {packed} compressed layers, which can't be read in "
                "parts: push the files with ORAS or as a ModelPack, or build the image with "
                "`--output type=image,compression=uncompressed`"
            )
        return Found(digest, tuple(files.values()))

    @contextmanager
    def open(
        self, _revision: str | None, file: SourceFile, start: int, stop: int | None = None
    ) -> Iterator[tuple[Reader, int]]:
        """Open a file at its place in a layer."""
        algorithm, hexadecimal, *rest = (file.version or "").split(":")
        digest, offset = f"{algorithm}:{hexadecimal}", int(rest[0]) if rest and rest[0].isdecimal() else 0
        if _DIGEST.fullmatch(digest) is None:
            raise SourceError(f"{self.uri}: the lock has an invalid version of {file.path}: delete it")
        end = offset + (file.size if stop is None else min(stop, file.size))
        with Registry(self.host) as registry, self._explained():
            yield Chunks(self._pieces(registry, digest, offset + start, end)), start

    def _pieces(self, registry: Registry, digest: str, start: int, end: int) -> Iterator[bytes]:
        try:
            yield from registry.part(self.repository, digest, start, end)
        except NoAnswerError as error:
            raise InterruptedStreamError(str(error)) from error

    def _layers(self, registry: Registry, name: str) -> tuple[str, list[Layer]]:
        """The digest of a manifest and its layers; of an image for several platforms, those of this project's."""
        found = registry.manifest(self.repository, name)
        if found is None:
            raise SourceError(f"{self.host}/{self.repository} has no `{name}`")
        digest, document = digest_of(found[0]), self._document(found[0])
        if document.get("mediaType") == INDEX or "manifests" in document:
            entries = [each for each in document["manifests"] if _of_platform(each.get("platform"))]
            if len(entries) != 1 or _DIGEST.fullmatch(str(entries[0].get("digest"))) is None:
                raise SourceError(f"{self.uri} is an index without exactly one artifact for linux/amd64")
            found = registry.manifest(self.repository, entries[0]["digest"])
            if found is None:
                raise SourceError(f"{self.uri} lists {entries[0]['digest']}, which the registry does not have")
            document = self._document(found[0])
        layers = document.get("layers")
        if not isinstance(layers, list) or len(layers) > _MOST_LAYERS:
            raise SourceError(f"{self.uri} has no list of at most {_MOST_LAYERS} layers: it is not an OCI artifact")
        return digest, [self._layer(each) for each in layers]

    def _layer(self, entry: object) -> Layer:
        found = entry if isinstance(entry, dict) else {}
        digest, size, notes = found.get("digest"), found.get("size"), found.get("annotations") or {}
        if not (
            isinstance(digest, str) and _DIGEST.fullmatch(digest) and type(size) is int and size >= 0
            and isinstance(notes, dict)
        ):  # fmt: skip
            raise SourceError(f"{self.uri} has a layer without a valid digest and size: it is not an OCI artifact")
        return Layer(digest, size, str(found.get("mediaType")), {str(key): str(value) for key, value in notes.items()})

    def _files(self, registry: Registry, layer: Layer) -> list[SourceFile]:
        if layer.path is not None:
            sha256 = layer.digest.removeprefix("sha256:")
            return [SourceFile(layer.path.removeprefix("./"), layer.size, sha256, version=layer.digest)]
        return [] if layer.is_compressed else self._members(registry, layer)

    def _members(self, registry: Registry, layer: Layer) -> list[SourceFile]:
        """The regular files of an archive, from its headers alone; links are left out."""
        files: list[SourceFile] = []
        deadline = time.monotonic() + _LIST_SECONDS
        try:
            with tarfile.open(fileobj=_Headers(registry, self.repository, layer), mode="r:") as archive:  # type: ignore[call-overload]
                for member in archive:
                    if len(files) > _MOST_MEMBERS or time.monotonic() > deadline:
                        raise SourceError(f"{self.uri}: the headers of {layer.digest} have no end: it is not a model")
                    if member.isreg() and member.sparse is None:
                        place = f"{layer.digest}:{member.offset_data}"
                        files.append(SourceFile(_below_models(member.name), member.size, version=place))
        except tarfile.TarError as error:
            raise SourceError(f"{self.uri}: {layer.digest} can't be read as an archive: {error}") from error
        return files

    def _document(self, data: bytes) -> dict[str, Any]:
        try:
            found = read_json(data, DOCUMENT)
        except DocumentError as error:
            raise SourceError(f"{self.uri}: its manifest can't be read: {error}") from error
        if not isinstance(found, dict):
            raise SourceError(f"{self.uri}: its manifest is not a JSON object")
        return found

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except NoAnswerError as error:
            raise UnreachableError(f"{self.uri}: {error}; run again: downloaded parts are kept") from error
        except DistributionError as error:
            raise SourceError(f"{self.uri}: {error}") from error


class _Headers:
    """An archive in a registry as `tarfile` reads it: it seeks from header to header, and reads some kilobytes."""

    def __init__(self, registry: Registry, repository: str, layer: Layer) -> None:
        self._registry, self._repository, self._layer = registry, repository, layer
        self._at, self._start, self._window = 0, 0, b""

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("only from the beginning")
        self._at = offset
        return offset

    def read(self, count: int) -> bytes:
        """Read from the window; a header that is larger than one, which only a hostile archive has, is refused."""
        if count > _HEADERS:
            raise tarfile.ReadError(f"a header of {count} bytes")
        end = min(self._at + count, self._layer.size)
        if not self._start <= self._at <= end <= self._start + len(self._window):
            stop = min(self._at + _HEADERS, self._layer.size)
            pieces = (
                self._registry.part(self._repository, self._layer.digest, self._at, stop) if stop > self._at else ()
            )
            self._start, self._window = self._at, b"".join(pieces)
        found = self._window[self._at - self._start : end - self._start]
        self._at += len(found)
        return found


def _below_models(name: str) -> str:
    """The name of a file in a ModelCar, whose model is in ``/models``; of another archive the path in it."""
    path = PurePosixPath(name.lstrip("/"))
    return "/".join(path.parts[1:] if path.parts[:1] == (_MODELS,) else path.parts)


def _of_platform(platform: object) -> bool:
    """Whether a manifest of an index is for this project's platform, or for any."""
    return platform is None or (
        isinstance(platform, dict) and all(platform.get(key) == value for key, value in _PLATFORM.items())
    )


def open_artifact(uri: str, revision: str | None, _access: Access) -> OciArtifact:
    """Open ``oci://HOST/NAME:TAG`` or ``oci://HOST/NAME@sha256:…``."""
    match = _URI.fullmatch(uri)
    if match is None:
        raise SourceError(f"can't pull from `{uri}`: expected oci://HOST/NAME:TAG or oci://HOST/NAME@sha256:…")
    tag, digest = match["tag"], match["digest"]
    if revision is not None:
        raise SourceError(f"`revision` does not apply to {uri}: name the tag or the digest in the URI; remove it")
    if tag is None and digest is None:
        raise SourceError(f"{uri} names neither a tag nor a digest: expected oci://HOST/NAME:TAG or …@sha256:…")
    return OciArtifact(match["host"], match["repository"], tag, digest)
