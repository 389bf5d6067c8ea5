"""Sources of weights: resolve a revision, pull its files, check each of them, and compare them with the lock.

Where the files lie is an `Origin`, chosen by the scheme of the URI (`pipeline.sources.origin`); which of them are
pulled is decided by `pipeline.sources.contents`. A lock (`pipeline.sources.lock`) pins the files of the first
successful pull.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.compatibility.safetensors_headers import (
    INDEX,
    INDEX_BOUNDS,
    SINGLE,
    HeaderError,
    Tensor,
    header_length,
    parse_header,
)
from pipeline.errors import ChangedSourceError, SourceError
from pipeline.sources import origin as origins
from pipeline.sources.contents import MODEL, Contents, is_hidden, listed, missing_weights
from pipeline.sources.folder import Folder
from pipeline.sources.lock import Lock, LockedFile, portable, read_lock, write_lock
from pipeline.sources.origin import Access, Origin, SourceFile
from registry.counting import Counter
from registry.digests import digest_json
from registry.download import Reader, fill
from registry.file_systems import set_mode
from registry.progress import Progress

if TYPE_CHECKING:
    from pipeline.settings import Settings

# The file of a home in which digests of folders' files are remembered.
_DIGESTS = "digests.json"
_CHUNK = 4 * 1024 * 1024
# One request reads most headers completely: a file of 5 GB has some hundred tensors, described in ten kilobytes.
_FIRST_READ = 128 * 1024
# Commits, and digests over what identifies the files: revisions become names of folders.
_REVISION = re.compile(r"[0-9a-f]{40}|sha256:[0-9a-f]{64}")
# More files than any model has, and more bytes than any disk: a list without end.
_MOST_FILES, _MOST_BYTES = 100_000, 1 << 50


@dataclass(frozen=True)
class ResolvedSource:
    """The exact files to pull. ``revision`` identifies them; None for a folder, which is identified by its files.

    ``left_out`` names the files that are not pulled. A folder's digests are remembered in the file ``memory``.
    """

    origin: Origin
    revision: str | None
    files: tuple[SourceFile, ...]
    left_out: tuple[str, ...]
    lock: Lock | None = None
    memory: Path | None = None
    contents: Contents = MODEL

    @property
    def uri(self) -> str:
        """The source without its revision, as locks and releases record it."""
        return self.origin.uri

    @property
    def folder(self) -> Path | None:
        """Where the files are, if they are on this machine."""
        return self.origin.path if isinstance(self.origin, Folder) else None

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the content: the revision, or the digest over a folder's files."""
        return self.revision or digest_json(self.sha256)

    @cached_property
    def sha256(self) -> dict[str, str]:
        """The digests of a folder's files when they were first requested: path → 64 hex digits."""
        if not isinstance(self.origin, Folder):
            raise SourceError(f"{self.uri} is not a folder")
        return self.origin.digests(self.files, self.memory)

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(file.size for file in self.files)


def resolve(
    uri: str,
    revision: str | None = None,
    *,
    access: Access = Access(),  # noqa: B008 - frozen
    lock: Lock | None = None,
    memory: Path | None = None,
    contents: Contents = MODEL,
) -> ResolvedSource:
    """List the files of ``uri`` at ``revision`` (for a hub a commit, tag or branch) without pulling them.

    Under a ``lock`` only a folder is looked at, because the lock lists the files. ``memory`` is where the digests of a
    folder's files are remembered (`pipeline.sources.file_digests`). ``contents`` is what it holds.

    Raises:
        SourceError: the source does not exist, can't be reached, holds refused files, or differs from the lock.
    """
    if uri.lower().endswith(".gguf") and not Path(uri.removeprefix("file:")).is_dir():
        raise missing_weights(uri, [Path(uri).name], SINGLE)
    origin = origins.open_origin(uri, revision, access)
    if lock is not None:
        lock.refuse_other(origin.uri, origin.pinned)
        if not isinstance(origin, Folder):
            return _as_locked(origin, lock, contents)
    with origins.explained(origin.uri):
        found = origin.find()
    if found.revision is not None and _REVISION.fullmatch(found.revision) is None:
        raise SourceError(f"{origin.uri} has no valid revision: {found.revision[:80]!r}")
    _refuse_endless(origin.uri, found.files)
    files = {file.path: file for file in found.files}
    names = list(files)

    def index() -> bytes:
        return origins.read_range(origin, found.revision, files[INDEX], 0, INDEX_BOUNDS.bytes + 1)

    weights = contents.weights(origin.uri, names, index)
    taken = [name for name in names if contents.is_taken(name, weights)]
    if lock is not None:
        lock.refuse_difference(dict.fromkeys(taken))
    contents.require(origin.uri, taken)
    if isinstance(origin, Folder):
        for name in taken:
            origin.opened(name).close()
    pulled = tuple(files[name] for name in taken)
    return ResolvedSource(
        origin=origin,
        revision=found.revision or _revision(origin, pulled),
        files=pulled,
        left_out=tuple(name for name in names if name not in taken and not is_hidden(Path(name))),
        lock=lock,
        memory=memory,
        contents=contents,
    )


def resolve_locked(
    uri: str, revision: str | None, lock: Path, settings: Settings, contents: Contents = MODEL
) -> ResolvedSource:
    """Resolve a source that a model's file names, under the ``lock`` file if it exists, as `resolve` does.

    Raises:
        SourceError: as `resolve`; or the lock file is not valid.
    """
    return resolve(
        uri,
        revision,
        access=Access.of(settings),
        lock=read_lock(lock),
        memory=settings.home / _DIGESTS,
        contents=contents,
    )


def pull(resolved: ResolvedSource, folder: Path, downloads: Path, progress: Progress) -> dict[str, str]:
    """Pull the source's files into the empty ``folder``, check each, and return their sha256 by path.

    Downloads are kept in ``downloads`` until they are complete, so that an interrupted pull continues where it stopped.

    Raises:
        SourceError: files differ from the lock or the origin's list, are damaged, or need code to run; lists all of
            them.
    """
    for name in resolved.left_out:
        progress(f"not pulled: {name}")
    if isinstance(resolved.origin, Folder):
        digests = _copy_folder(resolved, resolved.origin, folder, progress)
    else:
        digests = _download(resolved, folder, downloads, progress)
    resolved.contents.check(folder, progress)
    progress(f"pulled {len(digests)} files, {resolved.bytes / 1e6:.1f} MB")
    return digests


def hold_to_lock(path: Path, resolved: ResolvedSource, sha256: Mapping[str, str]) -> None:
    """Compare the pulled files (path → sha256) with the lock in ``path``; write the lock if there is none.

    Raises:
        SourceError: listing all different, missing and extra files.
    """
    lock = read_lock(path)
    if lock is None:
        files = {
            file.path: LockedFile(size=file.size, sha256=sha256[file.path], version=file.version)
            for file in sorted(resolved.files, key=lambda file: file.path)
        }
        write_lock(Lock(path=path, uri=portable(resolved.uri, path), revision=resolved.revision, files=files))
    else:
        lock.refuse_difference(sha256)


def revision_of(resolved: ResolvedSource, sha256: Mapping[str, str]) -> str:
    """The revision that a release records; for a folder the digest over its files' digests."""
    return resolved.revision or digest_json(dict(sha256))


def public_uri(uri: str) -> str:
    """Return the URI as it is published: of a local folder its name alone, since its path is private."""
    return f"file:{Path(uri.removeprefix('file:')).name}" if uri.startswith("file:") else uri


def read_header(resolved: ResolvedSource, file: SourceFile) -> dict[str, Tensor]:
    """Read the header of a safetensors file.

    Raises:
        SourceError: the hub does not answer.
        HeaderError: the header is not valid.
    """
    path = Path(file.path)
    first = read_range(resolved, file.path, 0, min(_FIRST_READ, file.size))
    if len(first) < 8:
        raise HeaderError(f"{path.name}: a file of {len(first)} bytes is not a safetensors file")
    length = header_length(first, path, file.size)
    if len(first) < 8 + length:
        first += read_range(resolved, file.path, len(first), 8 + length - len(first))
    if len(first) < 8 + length:
        raise HeaderError(f"{path.name}: the hub sent only a part of the header: try again")
    return parse_header(first[8 : 8 + length], path, file.size)


def read_range(resolved: ResolvedSource, name: str, start: int, length: int) -> bytes:
    """Read a part of a file.

    Raises:
        SourceError: the source does not answer, or has no such file.
    """
    for file in resolved.files:
        if file.path == name:
            return origins.read_range(resolved.origin, resolved.revision, file, start, length)
    raise SourceError(f"{resolved.uri} has no {name}")


def _revision(origin: Origin, files: tuple[SourceFile, ...]) -> str | None:
    """A digest over what identifies the files, sizes and versions; None for a folder, whose bytes are digested."""
    if isinstance(origin, Folder):
        return None
    return digest_json({file.path: [file.size, file.version] for file in files})


def _as_locked(origin: Origin, lock: Lock, contents: Contents) -> ResolvedSource:
    if lock.revision is None:
        raise SourceError(f"{lock.path} has no revision: delete it to lock {origin.uri} again")
    files = tuple(
        SourceFile(name, file.size, file.sha256, version=file.version) for name, file in sorted(lock.files.items())
    )
    weights = [name for name in lock.files if name.endswith(".safetensors")]
    if outside := [file.path for file in files if not contents.is_taken(file.path, weights)]:
        raise SourceError(
            f"{lock.path} lists {listed(outside)}, which is never pulled: delete it to lock the source again"
        )
    return ResolvedSource(origin, lock.revision, files, (), lock, contents=contents)


def _refuse_endless(uri: str, files: tuple[SourceFile, ...]) -> None:
    names = [file.path for file in files]
    if len(names) > _MOST_FILES or sum(file.size for file in files) > _MOST_BYTES:
        raise SourceError(f"{uri} lists more than {_MOST_FILES} files or {_MOST_BYTES >> 40} TiB: it is not a model")
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise SourceError(f"{uri} lists {listed(twice)} more than once")


def _copy_folder(resolved: ResolvedSource, origin: Folder, folder: Path, progress: Progress) -> dict[str, str]:
    digests: dict[str, str] = {}
    for file in resolved.files:
        progress(f"{file.path}: {file.size / 1e6:.1f} MB")
        digests[file.path] = origin.copy(file.path, folder / file.path)
    if resolved.lock is not None:
        resolved.lock.refuse_difference(digests)
    if changed := [name for name, digest in digests.items() if digest != resolved.sha256[name]]:
        raise SourceError(f"{resolved.uri}: {listed(changed)} changed while it was pulled: run again")
    return digests


def _download(resolved: ResolvedSource, folder: Path, downloads: Path, progress: Progress) -> dict[str, str]:
    revision = resolved.revision
    if revision is None or _REVISION.fullmatch(revision) is None:
        raise SourceError(f"{resolved.uri} has no valid revision")
    digests: dict[str, str] = {}
    problems: list[str] = []
    with _kept(downloads / _folder_name(resolved.uri), revision) as kept:
        for file in resolved.files:
            part = kept / (file.path + ".part")
            part.parent.mkdir(parents=True, exist_ok=True)
            digests[file.path] = _fetch(resolved, file, part, progress)
            if problem := _difference(part, file, digests[file.path]):
                part.unlink()
                problems.append(problem)
    if resolved.lock is not None:
        resolved.lock.refuse_difference(digests)
    if problems:
        raise SourceError(
            f"{resolved.uri}@{revision}: downloaded files differ from the digests that it states, run again: "
            + "; ".join(problems)
        )
    for file in resolved.files:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(kept / (file.path + ".part"), folder / file.path)
        set_mode(folder / file.path, 0o644)
    shutil.rmtree(kept.parent)
    return digests


@contextmanager
def _kept(folder: Path, revision: str) -> Iterator[Path]:
    """The folder of a revision's downloads; after an error it keeps what a later pull can use."""
    kept = folder / revision.removeprefix("sha256:")
    kept.mkdir(parents=True, exist_ok=True)
    try:
        yield kept
    except BaseException as error:  # also of an interrupt; it is raised again
        for part in kept.iterdir():
            if isinstance(error, ChangedSourceError) or not part.stat().st_size:
                part.unlink()
        for empty in (kept, folder):
            if not any(empty.iterdir()):
                empty.rmdir()
        raise


def _folder_name(uri: str) -> str:
    """A name for the folder of a source's downloads, which can't lead elsewhere."""
    named = re.sub(r"[^A-Za-z0-9._]+", "--", uri.partition(":")[2].strip("/"))
    return f"{named[:100].lstrip('.')}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"


def _fetch(resolved: ResolvedSource, file: SourceFile, part: Path, progress: Progress) -> str:
    """Download a file to ``part``, continuing after the bytes that it holds already, and return its sha256."""
    with part.open("a+b", buffering=0) as stream:
        held = os.fstat(stream.fileno()).st_size
        if held > file.size:
            stream.truncate(held := 0)
        progress(f"{file.path}: {file.size / 1e6:.1f} MB" + (f", {held / 1e6:.1f} of them here" if held else ""))
        counter = Counter(progress, file.path, file.size / 1e6, "MB", before=held / 1e6)

        @contextmanager
        def open_at(start: int) -> Iterator[tuple[Reader, int]]:
            with resolved.origin.open(resolved.revision, file, start) as (reader, begun):
                if begun != start:
                    counter.add(-start / 1e6)
                yield reader, begun

        with origins.explained(resolved.uri):
            return fill(file.path, stream.fileno(), held, file.size, open_at, lambda count: counter.add(count / 1e6))


def _difference(path: Path, file: SourceFile, sha256: str) -> str | None:
    """How a downloaded file differs from what its origin states. Git's digest also covers a header with the size."""
    if file.sha256 and sha256 != file.sha256:
        return f"{file.path}: sha256 {sha256}, expected {file.sha256}"
    if file.blob is None:
        return None
    blob = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            blob.update(chunk)
    return None if blob.hexdigest() == file.blob else f"{file.path}: git blob {blob.hexdigest()}, expected {file.blob}"
