"""A folder of this machine as a source, ``file:FOLDER``: copied with shared blocks where the file system has them.

A folder with pickles or with code is refused. Links may lead only to the same folder, or to the blobs of a Hugging Face
cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from pipeline.errors import SourceError
from pipeline.sources.contents import is_hidden, listed, pickles
from pipeline.sources.file_digests import digests_of
from pipeline.sources.origin import Access, Found, SourceFile
from registry import untrusted
from registry.download import Reader
from registry.errors import UntrustedFileError
from registry.file_systems import set_mode
from registry.walk import entries

_CHUNK = 4 * 1024 * 1024
# Names of blobs in the Hugging Face cache: git's digest, or the sha256 of a large file.
_BLOB = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
# Linux's ioctl that makes two files share their blocks (btrfs, XFS).
_FICLONE = 0x40049409


@dataclass(frozen=True)
class Folder:
    """An `Origin` whose files are on this machine. It has no revision: its files' digests identify it."""

    uri: str
    pinned: None = None

    @property
    def path(self) -> Path:
        """Where it is."""
        return Path(self.uri.removeprefix("file:"))

    def find(self) -> Found:
        """List the visible files; ``SourceError`` for a folder that holds pickles, code or links out of it."""
        if not self.path.is_dir():
            raise SourceError(f"there is no folder {self.path}")
        names = self._visible()
        if found := pickles(names):
            raise SourceError(
                f"{self.uri} holds {listed(found)}: a pickle can run code when it is loaded; convert it to safetensors "
                "and remove it from the folder"
            )
        if code := [name for name in names if name.endswith(".py")]:
            raise SourceError(f"{self.uri} holds {listed(code)}: code that comes with a model is never run; remove it")
        return Found(None, tuple(SourceFile(name, self._size(name)) for name in names))

    @contextlib.contextmanager
    def open(
        self, _revision: str | None, file: SourceFile, start: int, _stop: int | None = None
    ) -> Iterator[tuple[Reader, int]]:
        """Open a file; ``SourceError`` if it is not a regular file or lies outside of the folder."""
        with self.opened(file.path) as stream:
            stream.seek(start)
            yield cast("Reader", stream), start

    def digests(self, files: tuple[SourceFile, ...], memory: Path | None) -> dict[str, str]:
        """Return the files' sha256; those of unchanged files are remembered in the file ``memory``."""
        places = {file.path: Path(*self._place(file.path)) for file in files}
        found = digests_of(places.values(), memory)
        return {name: found[place] for name, place in places.items()}

    def copy(self, name: str, target: Path) -> str:
        """Copy a file, sharing blocks if possible, and return its sha256; its bytes are read once."""
        total = hashlib.sha256()
        with self.opened(name) as reader, target.open("w+b") as writer:
            try:
                fcntl.ioctl(writer, _FICLONE, reader.fileno())
            except OSError:
                while chunk := reader.read(_CHUNK):
                    total.update(chunk)
                    writer.write(chunk)
            else:
                while chunk := writer.read(_CHUNK):
                    total.update(chunk)
        set_mode(target, 0o644)
        return total.hexdigest()

    def opened(self, name: str) -> BinaryIO:
        """Open a file; ``SourceError`` if it is not a regular file or lies outside of the folder."""
        try:
            return untrusted.open_file(*self._place(name))
        except (OSError, UntrustedFileError) as error:
            raise SourceError(f"{self.path / name} can't be read: {error}") from error

    def _visible(self) -> list[str]:
        """Return the paths of the files, sorted and without hidden ones."""

        def refuse(name: str, why: str) -> None:
            if not is_hidden(Path(name)):
                raise SourceError(f"{self.uri} can't be used: `{name}`: {why}")

        found = [name for name, _ in entries(self.path, refuse) if not is_hidden(Path(name))]
        return sorted(found, key=lambda name: Path(name).parts)

    def _size(self, name: str) -> int:
        """A file's size; 0 for what can't be opened, which is refused if it is to be pulled (`opened`)."""
        with contextlib.suppress(OSError):
            return (self.path / name).stat().st_size
        return 0

    def _place(self, name: str) -> tuple[Path, str]:
        """The real place of a file: a folder without links, and the path in it.

        A link may lead to a file in the same folder or, as in the Hugging Face cache, from ``snapshots/REVISION`` to
        ``blobs/DIGEST`` beside it.

        Raises:
            SourceError: a link leads elsewhere, or its target does not exist.
        """
        place = self.path / name
        try:
            root, target = self.path.resolve(strict=True), place.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise SourceError(f"{place} can't be read: {error}") from error
        if target.is_relative_to(root):
            return root, target.relative_to(root).as_posix()
        blobs = root.parent.parent / "blobs"
        if root.parent.name == "snapshots" and target.parent == blobs and _BLOB.fullmatch(target.name):
            return blobs, target.name
        raise SourceError(
            f"{place} is a link to {target}: links may lead only to the same folder or to the blobs of a Hugging "
            "Face cache; replace the link by a copy of the file"
        )


def open_folder(uri: str, revision: str | None, _access: Access) -> Folder:
    """Open ``file:FOLDER``."""
    if revision is not None:
        raise SourceError(f"`revision` does not apply to {uri}: a folder has no revisions; remove it")
    return Folder(uri)
