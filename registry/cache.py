"""A cache of downloaded files by SHA-256. Releases link files from it that they have in common.

A cached file is hashed again each time it is linked: a link is the same file under another name, and whoever wrote to
one of them changed them all. What is not as its name says is thrown out and fetched anew.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from registry.download import CHUNK, hash_start
from registry.manifest import FileRecord, Manifest


@dataclass(frozen=True)
class Cache:
    """``folder`` keeps files for all pulls of this machine; ``former`` is the release that a pull replaces."""

    folder: Path | None = None
    former: Path | None = None
    former_files: Mapping[str, FileRecord] | None = None

    @classmethod
    def beside(cls, folder: Path | None, former: Path | None, manifest: Manifest | None) -> Cache:
        """Use the cache folder, and the release ``former`` whose manifest is given."""
        return cls(folder, former if manifest is not None else None, manifest.files if manifest is not None else None)

    def place(self, record: FileRecord, target: Path) -> bool:
        """Put the file with this content at ``target``, verified, without fetching it; False where none is had."""
        for source in self._having(record):
            if holds(source, record):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                _link(source, target)
                return True
            if self.folder is not None and source.is_relative_to(self.folder):
                source.unlink(missing_ok=True)
        return False

    def keep(self, record: FileRecord, file: Path) -> None:
        """Remember a verified file, by a link; where none can be made, on another file system, nothing is kept."""
        if self.folder is None:
            return
        name = _place(self.folder, record)
        with suppress(OSError):
            name.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, name)

    def _having(self, record: FileRecord) -> Iterator[Path]:
        for name, other in (self.former_files or {}).items():
            if self.former is not None and other == record:
                yield self.former / name
        if self.folder is not None:
            yield _place(self.folder, record)


def unused(folder: Path) -> list[Path]:
    """Return the cached files that no release on this machine shares: those with no other name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob("??/*") if path.is_file() and path.stat().st_nlink == 1)


def holds(path: Path, record: FileRecord) -> bool:
    """Whether a plain file is at ``path``, no link, and has this size and content."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if os.fstat(descriptor).st_size != record.size:
            return False
        return hash_start(descriptor, record.size, memoryview(bytearray(CHUNK))).hexdigest() == record.sha256
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _place(folder: Path, record: FileRecord) -> Path:
    return folder / record.sha256[:2] / record.sha256


def _link(source: Path, target: Path) -> None:
    """Link; a copy where none can be made, as between two file systems."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        beside = target.with_name(f".{uuid.uuid4().hex}")
        shutil.copyfile(source, beside)
        beside.rename(target)
