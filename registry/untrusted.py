"""Reading files that are not trusted: of a worker, a source, or an interrupted pull.

Whoever wrote the folder may have put a link, a FIFO or a device where a file is expected, or a file without end. So a
file is opened relative to a handle of its folder, one name after the other, without following links and without
waiting; it is a regular file of at most so many bytes, or there is an error. A new file never goes through what lies
there under its name.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from registry.errors import UntrustedFileError

# More entries or deeper folders occur in no worker's output and no release.
MOST_ENTRIES, DEEPEST = 100_000, 64
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@contextmanager
def folder_handle(folder: Path, *, make: bool = False, within: str = ".") -> Iterator[int]:
    """Give a handle of the folder ``within`` a folder, neither of which may be a link; with ``make`` it is made.

    What is above ``folder`` is the caller's own and may hold links.

    Raises:
        UntrustedFileError: A part of ``within`` is a link or no folder, or leads outside.
        FileNotFoundError: It is not there.
    """
    handle = _enter(folder, None)
    try:
        for part in _parts(within):
            if make:
                with suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=handle)
            inner = _enter(Path(part), handle, folder)
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


def open_file(folder: Path, name: str, limit: int | None = None) -> BinaryIO:
    """Open the regular file ``name`` below ``folder`` for reading.

    Args:
        folder: A folder; a link in its place is refused.
        name: A relative path in it.
        limit: The most bytes that it may have now; None for any.

    Raises:
        UntrustedFileError: It is a link, a FIFO or anything else, or too large, or a folder on the way is a link.
        FileNotFoundError: It is not there.
    """
    *folders, last = _parts(name) or ("",)
    with folder_handle(folder, within="/".join(folders) or ".") as handle:
        try:
            descriptor = os.open(last, os.O_RDONLY | _FILE, dir_fd=handle)
        except FileNotFoundError:
            raise
        except OSError as error:  # ELOOP of a link, ENXIO of a socket
            raise UntrustedFileError(f"`{folder / name}` is not a regular file ({error.strerror})") from error
    about = os.fstat(descriptor)
    if stat.S_ISREG(about.st_mode) and (limit is None or about.st_size <= limit):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    found = f"has {about.st_size} bytes: expected at most {limit}" if stat.S_ISREG(about.st_mode) else "is not a file"
    raise UntrustedFileError(f"`{folder / name}` {found}")


def read(folder: Path, name: str, limit: int) -> bytes:
    """Return what the regular file ``name`` below ``folder`` holds, at most ``limit`` bytes.

    Raises:
        UntrustedFileError, FileNotFoundError: See `open_file`; it may also have grown beyond the limit meanwhile.
    """
    with open_file(folder, name, limit) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise UntrustedFileError(f"`{folder / name}` has more than {limit} bytes")
    return data


def create_file(folder: Path, name: str, mode: int = 0o644) -> BinaryIO:
    """Open a new, empty file below ``folder`` for writing and reading; what had its name is removed first.

    Raises:
        UntrustedFileError: A folder has that name, or a folder on the way is a link.
    """
    *folders, last = _parts(name)
    with folder_handle(folder, within="/".join(folders) or ".", make=True) as handle:
        try:
            with suppress(FileNotFoundError):
                os.unlink(last, dir_fd=handle)
            descriptor = os.open(last, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FILE, mode, dir_fd=handle)
        except OSError as error:
            raise UntrustedFileError(f"`{folder / name}` can't be written anew: {error.strerror}") from error
    return os.fdopen(descriptor, "w+b")


def plain_files(folder: Path) -> list[str]:
    """Return the relative paths of all files below ``folder``, sorted, once nothing but files and folders is there.

    Raises:
        UntrustedFileError: It holds links or special files (all are named), or too much.
        FileNotFoundError: It is not there.
    """
    found: list[str] = []
    odd: list[str] = []
    waiting = ["."]
    entries = 0
    while waiting:
        within = waiting.pop()
        if within.count("/") > DEEPEST:
            raise UntrustedFileError(f"`{folder}` is more than {DEEPEST} folders deep")
        with folder_handle(folder, within=within) as handle, os.scandir(handle) as listing:
            for entry in listing:
                entries += 1
                if entries > MOST_ENTRIES:
                    raise UntrustedFileError(f"`{folder}` holds more than {MOST_ENTRIES} entries")
                name = entry.name if within == "." else f"{within}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(name)
                else:
                    (found if entry.is_file(follow_symlinks=False) else odd).append(name)
    if odd:
        named = ", ".join(f"`{name}`" for name in sorted(odd)[:8]) + (" and more" if len(odd) > 8 else "")
        raise UntrustedFileError(f"`{folder}` holds {named}: expected regular files, found links or special files")
    return sorted(found)


def _parts(name: str) -> tuple[str, ...]:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise UntrustedFileError(f"{name!r} leads out of its folder")
    return parts


def _enter(folder: Path, handle: int | None, above: Path | None = None) -> int:
    try:
        return os.open(folder, _FOLDER, dir_fd=handle)
    except FileNotFoundError:
        raise
    except OSError as error:  # ELOOP or ENOTDIR of a link
        shown = folder if above is None else above / folder
        raise UntrustedFileError(f"`{shown}` is a link or not a folder ({error.strerror})") from error
