"""Blobs by digest under ``$SLIPWAY_HOME/images``: the layers shared by many images, and digests of the others.

- ``blobs/sha256/<hex>``: a layer of a base or of a runtime, written atomically.
- ``known/<key>``: the digest of a layer that is streamed from an artifact; the key covers all that determines it.
- ``pushed/<registry>/<hex>``: a repository of that registry that has the blob, to mount it from.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from containers.errors import ImageError
from containers.image.layers import FileLayer, read_file, write_chunks
from registry.atomic_write import write_atomically
from registry.file_systems import set_mode

PLAIN = "application/vnd.oci.image.layer.v1.tar"
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class WrittenDescriptor(TypedDict):
    """A descriptor of the OCI Image Specification 1.1, as it is written: a blob or a manifest, by its digest."""

    mediaType: str
    digest: str
    size: int
    artifactType: NotRequired[str]
    annotations: NotRequired[dict[str, str]]


@dataclass(frozen=True)
class Blob:
    """A layer of an image. ``diff_id`` is the digest of the tar, ``digest`` that of the bytes sent to a registry.

    The registry or the engine that receives the ``chunks`` checks the digest.
    """

    digest: str
    size: int
    diff_id: str
    media_type: str
    chunks: Callable[[], Iterator[bytes]]

    @property
    def descriptor(self) -> WrittenDescriptor:
        """The blob's descriptor in a manifest."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


class BlobStore:
    """The blobs of a home. Several processes may use it at the same time."""

    def __init__(self, root: Path) -> None:
        """Use the folder ``root``, which is made with the first blob."""
        self.root = root

    def path(self, digest: str) -> Path:
        """Return the path of a blob, which need not exist."""
        if not _DIGEST.fullmatch(digest):
            raise ImageError(f"`{digest}` is not a sha256 digest")
        return self.root / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def has(self, digest: str, size: int) -> bool:
        """Whether the blob is stored in its full length."""
        path = self.path(digest)
        return path.is_file() and path.stat().st_size == size

    def add(self, chunks: Iterable[bytes], expected: str | None = None) -> tuple[str, int]:
        """Write and hash a blob; return its digest and size.

        Raises:
            ImageError: its digest is not the expected one.
        """
        folder = self.root / "blobs" / "sha256"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".part-", delete=False) as file:
            beside = Path(file.name)
            try:
                digest, size = write_chunks(chunks, file.file)
                _expect(digest, expected)
                file.flush()
                os.fsync(file.fileno())
                set_mode(beside, 0o644)
                beside.rename(self.path(digest))
            except BaseException:  # including Ctrl-C: no incomplete blob stays
                beside.unlink(missing_ok=True)
                raise
        return digest, size

    def plain(self, chunks: Iterable[bytes]) -> Blob:
        """Store a layer and return it."""
        return self.layer(*self.add(chunks))

    def layer(self, digest: str, size: int, diff_id: str | None = None, media_type: str = PLAIN) -> Blob:
        """Return a stored layer."""
        return Blob(digest, size, diff_id or digest, media_type, lambda: read_file(self.path(digest)))

    def known(self, layer: FileLayer) -> Blob | None:
        """Return a streamed layer if its digest is known from earlier, without reading it; else None."""
        key = layer.key
        if key is None:
            return None
        try:
            digest = (self.root / "known" / key).read_text()
        except FileNotFoundError:
            return None
        return Blob(digest, layer.size, digest, PLAIN, layer.unchecked) if _DIGEST.fullmatch(digest) else None

    def learn(self, layer: FileLayer, digest: str) -> Blob:
        """Record the digest of a streamed layer, once all its ``chunks`` have been read."""
        if layer.key is not None:
            _note(self.root / "known" / layer.key, digest)
        return Blob(digest, layer.size, digest, PLAIN, layer.unchecked)

    def hashed(self, layer: FileLayer) -> Blob:
        """Return a streamed layer with its digest; it is read once if the digest is not known.

        Raises:
            ImageError: a file's sha256 differs from the recorded one.
        """
        blob = self.known(layer)
        if blob is not None:
            return blob
        digest = hashlib.sha256()
        for chunk in layer.chunks():
            digest.update(chunk)
        return self.learn(layer, f"sha256:{digest.hexdigest()}")

    def pushed_to(self, registry: str, digest: str) -> str | None:
        """Return a repository of ``registry`` that is known to have the blob."""
        try:
            return self._place(registry, digest).read_text()
        except FileNotFoundError:
            return None

    def note_push(self, registry: str, digest: str, repository: str) -> None:
        """Record that a repository has the blob."""
        _note(self._place(registry, digest), repository)

    def _place(self, registry: str, digest: str) -> Path:
        name = hashlib.sha256(registry.encode()).hexdigest()[:16]
        return self.root / "pushed" / name / digest.removeprefix("sha256:")


def _expect(digest: str, expected: str | None) -> None:
    if expected is not None and digest != expected:
        raise ImageError(f"expected the blob {expected}, but its content has the digest {digest}")


def _note(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
