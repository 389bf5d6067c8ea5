"""Layers of our own: tars that are the same whoever makes them, wherever and whenever.

The law: a layer's bytes follow from its members' names, modes and contents alone. Members stand in the order of their
paths; owner is 0, the time is `EPOCH`, no user, group or machine is named; numbers and names that a plain header can't
hold go into a PAX header, which holds nothing else; the archive ends with two zero blocks and no further padding.
Layers are never compressed: weights don't shrink, and a compressor's version would be in every digest.
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

# The time of everything in an image: 2025-01-01. mmdebstrap sets every younger time in a base to it.
EPOCH = 1735689600
EPOCH_TEXT = "2025-01-01T00:00:00Z"
CHUNK = 1 << 20
# Raised when the same members become other bytes.
FORMAT = 1
_BLOCK = 512
# What of an extended header is content: what a file may do, not when it was read.
_KEPT_PAX = "SCHILY.xattr.security.capability"


@dataclass(frozen=True)
class Member:
    """A file as it is to be in the image: its path without the leading slash, and where its bytes are."""

    name: str
    content: Path | bytes
    mode: int = 0o644

    @property
    def size(self) -> int:
        """Bytes of its content."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class FileLayer:
    """A layer of plain files, streamed from where they are; nothing is written beside them.

    ``sha256`` (path of a member's content → hex digest) is what is known already of the files, and what `chunks` holds
    them to; with all of them known, ``key`` names the layer's bytes before any is read.
    """

    members: tuple[Member, ...]
    sha256: Mapping[Path, str]

    @property
    def size(self) -> int:
        """Bytes of the tar."""
        files = sum(len(_header(member)) + _padded(member.size) for member in self.members)
        return sum(len(_folder(name)) for name in _parents(self.members)) + files + 2 * _BLOCK

    @property
    def key(self) -> str | None:
        """What decides the layer's bytes, as 64 hex digits; None where a file's digest is not known."""
        known = []
        for member in self.members:
            if isinstance(member.content, bytes):
                digest: str | None = hashlib.sha256(member.content).hexdigest()
            else:
                digest = self.sha256.get(member.content)
            if digest is None:
                return None
            known.append([member.name, member.mode, member.size, digest])
        return hashlib.sha256(json.dumps([FORMAT, EPOCH, known]).encode()).hexdigest()

    def chunks(self) -> Iterator[bytes]:
        """Yield the tar in pieces of at most `CHUNK` bytes, each file hashed on its way.

        Raises:
            ImageError: a file changed its length while it was read, or is not the one that is known.
        """
        return self._chunks(self.sha256)

    def unchecked(self) -> Iterator[bytes]:
        """Yield the same for whoever holds the whole tar to its digest."""
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
    """Return the files under ``folder`` as members under ``inside``: modes 0755 where the owner may run it, else 0644.

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
    """Return a layer of ``members``, in order of their paths."""
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
    """Turn a tar that an engine gave of a folder into a layer, piece by piece.

    Args:
        stream: the tar; its first member is the folder itself.
        inside: the folder's parent in the image, without the leading slash (``opt``; empty for the root).
        skip: paths in the image that are left out, with all that is under them.
        only: the paths in the image that are taken; None for all.
        removed: paths that the layer takes away from those below it.
        keep_owners: whether numeric owners are content, as in a distribution's files; else all is root's.

    Raises:
        ImageError: members do not come in the order of their paths, as engines give them.
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
                raise ImageError(f"the engine gave `{path}` after `{'/'.join(before)}`: no layer can be made of that")
            before = parts
            yield _clean(member, path, inside, keep_owners=keep_owners)
            file = source.extractfile(member) if member.isreg() else None
            if file is not None:
                yield from pieces(file)
                yield _padding(member.size)
    yield bytes(2 * _BLOCK)


def normalized_file(path: Path) -> Iterator[bytes]:
    """Turn a tar on disk, in whatever order, into a layer; numeric owners are kept, hard links name the first path.

    Raises:
        ImageError: a path other than a folder's stands in it twice.
    """
    with tarfile.open(path) as source:
        found: dict[tuple[str, ...], tarfile.TarInfo] = {}
        for member in source:
            parts = tuple(part for part in PurePosixPath(member.name).parts if part not in {".", "/"})
            if parts and parts in found and not (member.isdir() and found[parts].isdir()):
                raise ImageError(f"`{'/'.join(parts)}` stands twice in {path.name}")
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
    """A file-like view of pieces of bytes."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """It is for reading."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill the buffer with what comes next; 0 at the end."""
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
    """Yield a file's bytes in pieces of at most `CHUNK`."""
    with path.open("rb") as file:
        yield from pieces(file)


def pieces(file: IO[bytes]) -> Iterator[bytes]:
    """Yield what is left of an open file in pieces of at most `CHUNK`."""
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
        raise ImageError(f"{path} is damaged: its sha256 is {digest.hexdigest()}, and {sha256} was recorded")


def _header(member: Member) -> bytes:
    info = tarfile.TarInfo(member.name)
    info.size, info.mode = member.size, member.mode
    return _bytes(info)


def _folder(name: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.mode = tarfile.DIRTYPE, 0o755
    return _bytes(info)


def _clean(member: tarfile.TarInfo, name: str, inside: str, *, keep_owners: bool) -> bytes:
    """The header of a member without times and names. A hard link names its target as the image has it."""
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
    """Every folder on the way to a member, so that each layer stands alone and no engine invents one with its umask."""
    found = {name for member in members for name in _ancestors(PurePosixPath(member.name).parent)}
    return sorted(found, key=lambda name: PurePosixPath(name).parts)


def _ancestors(path: PurePosixPath) -> list[str]:
    return [str(each) for each in reversed([path, *path.parents]) if str(each) != "."]


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


def _padded(size: int) -> int:
    return size + -size % _BLOCK


def member_bytes(name: str, size: int) -> bytes:
    """Return the header of a plain file in an archive that holds blobs; ``padding_after`` follows its content."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return _bytes(info)


def padding_after(size: int) -> bytes:
    """Return the zeros that fill a member's last block."""
    return _padding(size)


def write_chunks(chunks: Iterable[bytes], sink: IO[bytes]) -> tuple[str, int]:
    """Write pieces and return ``sha256:…`` and the number of bytes."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        sink.write(chunk)
        size += len(chunk)
    return f"sha256:{digest.hexdigest()}", size
