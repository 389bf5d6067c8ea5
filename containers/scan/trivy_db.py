"""Reads what Trivy's vulnerability database contains. With an empty one, Trivy finds nothing and exits 0 silently.

The database is a BoltDB file. Its top-level buckets are named after the systems and ecosystems of their advisories:
``debian 12``, ``pip::GitHub Security Advisory pip``, ... The page format is that of go.etcd.io/bbolt; its layout is
described in tests/stages/trivy_db/make_trivy_db.py, which writes it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from containers.errors import ContainerError

State = Literal["absent", "damaged", "empty", "incomplete", "ok"]

SCHEMA = 2
_MAGIC = 0xED0CDAED
_HEADER = 16
_BRANCH, _LEAF = 0x01, 0x02
_IS_BUCKET = 1
# Buckets without advisories.
_OTHER_BUCKETS = ("vulnerability", "data-source", "trivy", "Red Hat CPE")
# Trivy's result type → prefix of the buckets with its advisories.
_ECOSYSTEMS = {
    "python-pkg": "pip::",
    "conda-pkg": "pip::",
    "gobinary": "go::",
    "node-pkg": "npm::",
    "jar": "maven::",
    "gemspec": "rubygems::",
    "rustbinary": "cargo::",
}
# Number of version components in the name of a distribution's bucket.
_DISTRIBUTIONS = {
    "debian": 1,
    "ubuntu": 2,
    "alpine": 2,
    "rocky": 1,
    "alma": 1,
    "photon": 2,
    "wolfi": 0,
    "chainguard": 0,
}


class DatabaseDamagedError(ContainerError):
    """The database file is not a valid BoltDB file, or is incomplete."""


@dataclass(frozen=True)
class Database:
    """The state of the vulnerability database in a cache folder.

    ``buckets`` are the names of the top-level buckets that are not empty; ``damage`` says what is wrong with an
    existing file. Without a file, all fields except ``path`` are None or empty.
    """

    path: Path
    digest: str | None = None
    updated_at: str | None = None
    next_update: str | None = None
    buckets: tuple[str, ...] = ()
    damage: str | None = None

    @property
    def is_usable(self) -> bool:
        """Whether Trivy can use it."""
        return self.digest is not None and self.damage is None

    def state_for(self, family: str | None, release: str | None, kinds: Iterable[str]) -> tuple[State, list[str]]:
        """Return whether the database can have findings for an image, and what it has no advisories for.

        Args:
            family: the image's distribution as Trivy names it (``debian``), or None where there is none.
            release: its version (``12.8``).
            kinds: the types of Trivy's results for it (``python-pkg``).
        """
        if self.digest is None:
            return "absent", []
        if self.damage is not None:
            return "damaged", []
        if not any(bucket not in _OTHER_BUCKETS for bucket in self.buckets):
            return "empty", []
        lacking = []
        if family is not None:
            distribution = _distribution(family, release or "")
            if not any(bucket.lower() == distribution for bucket in self.buckets):
                lacking.append(distribution)
        wanted = sorted({_ECOSYSTEMS[kind] for kind in kinds if kind in _ECOSYSTEMS})
        if family is None and not wanted:
            lacking.append("an image without recognized distribution or packages")
        have = {bucket.partition("::")[0] + "::" for bucket in self.buckets}
        lacking += [start.removesuffix("::") for start in wanted if start not in have]
        return ("incomplete", lacking) if lacking else ("ok", [])


def read_database(cache: Path) -> Database:
    """Read the state of the database in a Trivy cache folder. It does not raise: ``damage`` says what is wrong."""
    path, metadata = cache / "db" / "trivy.db", cache / "db" / "metadata.json"
    if not path.is_file():
        return Database(path)
    status = path.stat()
    digest = _digest(path, status.st_size, status.st_mtime_ns)
    try:
        dates = _dates(json.loads(metadata.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Database(path, digest, damage=f"{metadata.name} can't be read: {type(error).__name__} {error}")
    try:
        buckets = tuple(filled_buckets(path))
    except DatabaseDamagedError as error:
        return Database(path, digest, *dates, damage=str(error))
    return Database(path, digest, *dates, buckets)


def filled_buckets(path: Path) -> Iterator[str]:
    """Yield the names of a BoltDB file's top-level buckets that have at least one key.

    Raises:
        DatabaseDamagedError: it is not a valid BoltDB file, or is truncated.
    """
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield from _filled(data, *_meta(data))
        except (struct.error, ValueError, IndexError) as error:
            raise DatabaseDamagedError(f"{path.name} is damaged: {error}") from error


@functools.lru_cache(maxsize=8)
def _digest(path: Path, _size: int, _modified_ns: int) -> str:
    """The file's sha256. The file is large, so it is cached per process by size and time."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _dates(metadata: Mapping[str, Any]) -> tuple[str, str]:
    if metadata["Version"] != SCHEMA:
        raise ValueError(f"schema {metadata['Version']}, expected {SCHEMA}")
    for name in ("UpdatedAt", "NextUpdate"):
        if datetime.fromisoformat(metadata[name]).tzinfo is None:
            raise ValueError(f"{name} has no time zone")
    return metadata["UpdatedAt"], metadata["NextUpdate"]


def _distribution(family: str, release: str) -> str:
    """The name of a distribution's bucket; by default family and version."""
    parts = release.split(".")[: _DISTRIBUTIONS.get(family, 2)]
    return " ".join([family, *([".".join(parts)] if parts and parts[0] else [])]).lower()


def _meta(data: mmap.mmap) -> tuple[int, int]:
    """The page size and the root page, from the newer of the two meta pages with a valid checksum."""
    best: tuple[int, int, int] | None = None
    (size,) = struct.unpack_from("<I", data, _HEADER + 8)
    for at in (0, size):
        try:
            magic, version, page_size, _, root, _, _, pages, transaction, checksum = struct.unpack_from(
                "<IIIIQQQQQQ", data, at + _HEADER
            )
        except struct.error:
            continue
        if (magic, version) != (_MAGIC, 2) or checksum != _fnv1a(data[at + _HEADER : at + _HEADER + 56]):
            continue
        if pages * page_size > len(data):
            raise ValueError(f"truncated: {len(data)} bytes of {pages * page_size}")
        if best is None or transaction > best[0]:
            best = (transaction, page_size, root)
    if best is None:
        raise ValueError("no valid meta page")
    return best[1], best[2]


def _filled(data: mmap.mmap, size: int, root: int) -> Iterator[str]:
    for flags, key, value in _entries(data, root * size, size):
        if flags & _IS_BUCKET:
            (child,) = struct.unpack_from("<Q", value)
            # A small bucket is stored inside the value, as page 0.
            page, at = (data, child * size) if child else (value, 16)
            if next(_entries(page, at, size), None) is not None:
                yield key.decode()


def _entries(data: mmap.mmap | bytes, at: int, size: int) -> Iterator[tuple[int, bytes, bytes]]:
    """Walk the entries of a bucket in key order: flags, key, value."""
    _, kind, count, _ = struct.unpack_from("<QHHI", data, at)
    if kind not in {_BRANCH, _LEAF}:
        raise ValueError(f"a page of kind {kind:#x}, expected a branch or a leaf")
    for place in range(at + _HEADER, at + _HEADER * (count + 1), _HEADER):
        if kind == _LEAF:
            flags, start, keys, values = struct.unpack_from("<IIII", data, place)
            middle = place + start + keys
            yield flags, data[place + start : middle], data[middle : middle + values]
        else:
            _, _, child = struct.unpack_from("<IIQ", data, place)
            yield from _entries(data, child * size, size)


def _fnv1a(data: bytes) -> int:
    """64-bit FNV-1a, the checksum of a meta page."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value
