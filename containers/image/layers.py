"""Reproducible image layers: the same files give the same tar on any machine at any time.

Invariant: a layer's bytes depend only on its members' names, modes and contents. Members are sorted by path; the owner
is 0, the time is `EPOCH`, and user and group names are empty. Numbers and names that do not fit into a plain header go
into a PAX header, which contains nothing else. The archive ends with two zero blocks and no further padding.
Layers are never compressed: weights do not get smaller, and every digest would depend on the compressor's version.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from containers.errors import ImageError

# The modification time of all files in an image: 2025-01-01. mmdebstrap sets later times in a base to it.
EPOCH = 1735689600
EPOCH_TEXT = "2025-01-01T00:00:00Z"
CHUNK = 1 << 20
# Increase it when the same members give other bytes.
FORMAT = 1
_BLOCK = 512
# The parts of extended headers that are content: a file's capabilities, but no times.
_KEPT_PAX = "SCHILY.xattr.security.capability"


@dataclass(frozen=True)
class Member:
    """A file of an image: its path without the leading slash, and the source of its content.

    With a ``target`` it is a symbolic link, without content.
    """

    name: str
    content: Path | bytes = b""
    mode: int = 0o644
    target: str | None = None

    @property
    def size(self) -> int:
        """Size of the content in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class FileLayer:
    """A layer of plain files, streamed from their sources, without a temporary file.

    ``sha256`` (path of a source → hex digest) has the known digests, which `chunks` checks. If all are known, ``key``
    identifies the layer's bytes before they are read.
    """

    members: tuple[Member, ...]
    sha256: Mapping[Path, str]

    @property
    def size(self) -> int:
        """Size of the tar in bytes."""
        files = sum(len(_header(member)) + _padded(member.size) for member in self.members)
        return sum(len(_folder(name)) for name in _parents(self.members)) + files + 2 * _BLOCK

    @property
    def key(self) -> str | None:
        """Digest over everything that determines the layer's bytes, in hex; None if a file's digest is not known."""
        known = []
        for member in self.members:
            if isinstance(member.content, bytes):
                digest: str | None = hashlib.sha256(member.content).hexdigest()
            else:
                digest = self.sha256.get(member.content)
            if digest is None:
                return None
            link = [] if member.target is None else [member.target]
            known.append([member.name, member.mode, member.size, digest, *link])
        return hashlib.sha256(json.dumps([FORMAT, EPOCH, known]).encode()).hexdigest()

    def chunks(self) -> Iterator[bytes]:
        """Yield the tar in chunks of at most `CHUNK` bytes, and check each file's digest.

        Raises:
            ImageError: a file's length changed while it was read, or its digest is not the known one.
        """
        return self._chunks(self.sha256)

    def unchecked(self) -> Iterator[bytes]:
        """Yield the same without checking the files, for callers that check the digest of the tar."""
        return self._chunks({})

    def _chunks(self, sha256: Mapping[Path, str]) -> Iterator[bytes]:
        for name in _parents(self.members):
            yield _folder(name)
        for member in self.members:
            yield _header(member)
            if isinstance(member.content, bytes):
                yield member.content
            else:
                yield from _content(member.content, sha256.get(member.content))
            yield _padding(member.size)
        yield bytes(2 * _BLOCK)


def plain_files(folder: Path, inside: str) -> list[Member]:
    """Return the files under ``folder`` as members under ``inside``, with mode 0755 if executable, else 0644.

    Symbolic links are followed: an artifact's files may be links into a store.
    """
    found = []
    for path in folder.rglob("*"):
        if path.is_dir():
            continue
        mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
        found.append(Member(f"{inside}/{path.relative_to(folder).as_posix()}", path, mode))
    return sorted(found, key=lambda member: PurePosixPath(member.name).parts)


def archive(members: Sequence[Member]) -> FileLayer:
    """Return a layer of ``members``, sorted by path."""
    return FileLayer(tuple(sorted(members, key=lambda member: PurePosixPath(member.name).parts)), {})


def normalized(
    stream: Iterable[bytes],
    *,
    inside: str,
    skip: Iterable[str] = (),
    only: Container[str] | None = None,
    removed: Iterable[str] = (),
    keep_owners: bool = False,
) -> Iterator[bytes]:
    """Convert an engine's tar of a folder to a reproducible layer, streaming.

    Args:
        stream: the tar; its first member is the folder itself.
        inside: the folder's parent in the image, without the leading slash (``opt``; empty for the root).
        skip: paths in the image to leave out, with everything below them.
        only: paths in the image to include; None for all.
        removed: paths that the layer removes from the layers below it.
        keep_owners: whether to keep numeric owners, as for a distribution's files; else root owns all files.

    Raises:
        ImageError: the members are not sorted by path, as those from engines are.
    """
    left_out = [PurePosixPath(path).parts for path in skip]
    before: tuple[str, ...] = ()
    for name in _ancestors(PurePosixPath(inside)) if inside else ():
        yield _folder(name)
    for path in sorted(removed):
        place = PurePosixPath(path)
        if not any(place.parts[: len(prefix)] == prefix for prefix in left_out):
            yield _header(Member(str(place.with_name(f".wh.{place.name}")), b""))
    with tarfile.open(fileobj=io.BufferedReader(Stream(stream), CHUNK), mode="r|") as source:
        for member in source:
            parts = tuple(part for part in (PurePosixPath(inside) / member.name).parts if part != ".")
            path = "/".join(parts)
            if not parts or any(parts[: len(prefix)] == prefix for prefix in left_out):
                continue
            if only is not None and path not in only:
                continue
            if parts <= before:
                raise ImageError(f"the engine sent `{path}` after `{'/'.join(before)}`, expected paths in order")
            before = parts
            yield _clean(member, path, inside, keep_owners=keep_owners)
            file = source.extractfile(member) if member.isreg() else None
            if file is not None:
                yield from pieces(file)
                yield _padding(member.size)
    yield bytes(2 * _BLOCK)


def normalized_file(path: Path) -> Iterator[bytes]:
    """Convert a tar file, in any order, to a reproducible layer. Owners are kept; hard links refer to the first path.

    Raises:
        ImageError: a path that is not a folder occurs twice.
    """
    with tarfile.open(path) as source:
        found: dict[tuple[str, ...], tarfile.TarInfo] = {}
        for member in source:
            parts = tuple(part for part in PurePosixPath(member.name).parts if part not in {".", "/"})
            if parts and parts in found and not (member.isdir() and found[parts].isdir()):
                raise ImageError(f"`{'/'.join(parts)}` occurs twice in {path.name}")
            if parts:
                found[parts] = member
        first: dict[str, str] = {}
        for parts in sorted(found):
            member, name = found[parts], "/".join(parts)
            target = found[PurePosixPath(member.linkname).parts] if member.islnk() else member
            known = first.setdefault(target.name, name)
            if target.isreg() and known != name:
                member.type, member.linkname, member.size = tarfile.LNKTYPE, known, 0
            elif member.islnk():
                member = target
            yield _clean(member, name, "", keep_owners=True)
            file = source.extractfile(member) if member.isreg() else None
            if file is not None:
                yield from pieces(file)
                yield _padding(member.size)
    yield bytes(2 * _BLOCK)


class Stream(io.RawIOBase):
    """A file-like object over chunks of bytes."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Read into the buffer; return the number of bytes, 0 at the end."""
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def read_file(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes in chunks of at most `CHUNK`."""
    with path.open("rb") as file:
        yield from pieces(file)


def pieces(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the rest of an open file in chunks of at most `CHUNK`."""
    while chunk := file.read(CHUNK):
        yield chunk


def _content(path: Path, sha256: str | None) -> Iterator[bytes]:
    digest = hashlib.sha256()
    expected = read = 0
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        expected = os.fstat(file.fileno()).st_size
        while chunk := file.read(CHUNK):
            read += len(chunk)
            if sha256 is not None:
                digest.update(chunk)
            yield chunk
    if read != expected:
        raise ImageError(f"{path} changed while it was read: {read} bytes of {expected}")
    if sha256 is not None and digest.hexdigest() != sha256:
        raise ImageError(f"{path} is damaged: its sha256 is {digest.hexdigest()}, expected {sha256}")


def _header(member: Member) -> bytes:
    info = tarfile.TarInfo(member.name)
    info.size, info.mode = member.size, member.mode
    if member.target is not None:
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, member.target, 0o777
    return _bytes(info)


def _folder(name: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.mode = tarfile.DIRTYPE, 0o755
    return _bytes(info)


def _clean(member: tarfile.TarInfo, name: str, inside: str, *, keep_owners: bool) -> bytes:
    """A member's header without times and names. A hard link refers to its target's path in the image."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size = member.type, member.mode & 0o7777, member.size
    if info.type in {tarfile.AREGTYPE, tarfile.CONTTYPE}:
        info.type = tarfile.REGTYPE
    info.linkname = str(PurePosixPath(inside) / member.linkname) if member.islnk() else member.linkname
    info.devmajor, info.devminor = member.devmajor, member.devminor
    info.pax_headers = {key: value for key, value in member.pax_headers.items() if key == _KEPT_PAX}
    return _bytes(info, (member.uid, member.gid) if keep_owners else (0, 0))


def _bytes(info: tarfile.TarInfo, owner: tuple[int, int] = (0, 0)) -> bytes:
    info.mtime, info.uname, info.gname = EPOCH, "", ""
    info.uid, info.gid = owner
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _parents(members: Iterable[Member]) -> list[str]:
    """All parent folders of the members, so that no engine creates one with the mode of its umask."""
    found = {name for member in members for name in _ancestors(PurePosixPath(member.name).parent)}
    return sorted(found, key=lambda name: PurePosixPath(name).parts)


def _ancestors(path: PurePosixPath) -> list[str]:
    return [str(each) for each in reversed([path, *path.parents]) if str(each) != "."]


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


def _padded(size: int) -> int:
    return size + -size % _BLOCK


def member_bytes(name: str, size: int) -> bytes:
    """Return the header of a plain file in an archive of blobs. `padding_after` must follow its content."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return _bytes(info)


def padding_after(size: int) -> bytes:
    """Return the zeros that complete a member's last block."""
    return _padding(size)


def write_chunks(chunks: Iterable[bytes], sink: IO[bytes]) -> tuple[str, int]:
    """Write chunks; return their digest as ``sha256:…`` and the number of bytes."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        sink.write(chunk)
        size += len(chunk)
    return f"sha256:{digest.hexdigest()}", size
