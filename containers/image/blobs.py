"""Blobs by digest under ``$SLIPWAY_HOME/images``: the layers that many images share, and what is known of the others.

- ``blobs/sha256/<hex>``: a layer of a base or of a runtime; it appears whole or not at all.
- ``known/<key>``: the digest of a layer that is streamed from an artifact, by what decides its bytes.
- ``pushed/<registry>/<hex>``: a repository of that registry that holds the blob, to mount it from.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from containers.errors import ImageError
from containers.image.layers import FileLayer, read_file, write_chunks
from registry.atomic_write import write_atomically
from registry.file_systems import set_mode

PLAIN = "application/vnd.oci.image.layer.v1.tar"
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Blob:
    """A layer as an image lists it. ``diff_id`` is the digest of the tar itself, ``digest`` that of what is sent.

    Whoever gets the ``chunks``, a registry or an engine, holds them to it.
    """

    digest: str
    size: int
    diff_id: str
    media_type: str
    chunks: Callable[[], Iterator[bytes]]

    @property
    def descriptor(self) -> dict[str, object]:
        """What a manifest says of it."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


class BlobStore:
    """The blobs of one home; safe to share between processes."""

    def __init__(self, root: Path) -> None:
        """Use ``root``, made when the first blob is."""
        self.root = root

    def path(self, digest: str) -> Path:
        """Where a blob is, or would be."""
        if not _DIGEST.fullmatch(digest):
            raise ImageError(f"`{digest}` is not a sha256 digest")
        return self.root / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def has(self, digest: str, size: int) -> bool:
        """Whether the blob is there in its full length."""
        path = self.path(digest)
        return path.is_file() and path.stat().st_size == size

    def add(self, chunks: Iterable[bytes], expected: str | None = None) -> tuple[str, int]:
        """Write a blob while it is hashed; return its digest and size.

        Raises:
            ImageError: it is not the one that was expected.
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
            except BaseException:  # Ctrl-C among them: no half-written blob stays
                beside.unlink(missing_ok=True)
                raise
        return digest, size

    def plain(self, chunks: Iterable[bytes]) -> Blob:
        """Keep a layer and return it."""
        return self.layer(*self.add(chunks))

    def layer(self, digest: str, size: int, diff_id: str | None = None, media_type: str = PLAIN) -> Blob:
        """Return a layer that is kept here."""
        return Blob(digest, size, diff_id or digest, media_type, lambda: read_file(self.path(digest)))

    def known(self, layer: FileLayer) -> Blob | None:
        """Return a streamed layer whose digest is known from an earlier time; no byte of it is read."""
        key = layer.key
        if key is None:
            return None
        try:
            digest = (self.root / "known" / key).read_text()
        except FileNotFoundError:
            return None
        return Blob(digest, layer.size, digest, PLAIN, layer.unchecked) if _DIGEST.fullmatch(digest) else None

    def learn(self, layer: FileLayer, digest: str) -> Blob:
        """Keep in mind what a streamed layer's digest is, once all of it came through its ``chunks``."""
        if layer.key is not None:
            _note(self.root / "known" / layer.key, digest)
        return Blob(digest, layer.size, digest, PLAIN, layer.unchecked)

    def hashed(self, layer: FileLayer) -> Blob:
        """Return a streamed layer with its digest, read through once where that is not known.

        Raises:
            ImageError: a file is not the one whose sha256 the layer knows.
        """
        blob = self.known(layer)
        if blob is not None:
            return blob
        digest = hashlib.sha256()
        for chunk in layer.chunks():
            digest.update(chunk)
        return self.learn(layer, f"sha256:{digest.hexdigest()}")

    def pushed_to(self, registry: str, digest: str) -> str | None:
        """Return a repository of ``registry`` that was seen to hold the blob."""
        try:
            return self._place(registry, digest).read_text()
        except FileNotFoundError:
            return None

    def note_push(self, registry: str, digest: str, repository: str) -> None:
        """Keep in mind that a repository holds the blob."""
        _note(self._place(registry, digest), repository)

    def _place(self, registry: str, digest: str) -> Path:
        name = hashlib.sha256(registry.encode()).hexdigest()[:16]
        return self.root / "pushed" / name / digest.removeprefix("sha256:")


def _expect(digest: str, expected: str | None) -> None:
    if expected is not None and digest != expected:
        raise ImageError(f"what came as {expected} is {digest}")


def _note(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
