"""Locks on files, which the kernel releases when the process that holds them ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from registry.errors import FileSystemError

_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL})


def flock(file: IO[bytes] | IO[str] | int, operation: int) -> None:
    """Lock an open file, as `fcntl.flock` does.

    Without locks (Lustre without ``-o flock``: ENOSYS) two processes would write the same files, so their absence is
    an error.

    Raises:
        BlockingIOError: Another process holds the lock, and ``operation`` has ``LOCK_NB``.
        FileSystemError: The file system has no locks.
    """
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        descriptor = file if isinstance(file, int) else file.fileno()
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        raise FileSystemError(
            f"the file system of {path} has no locks (flock: {error.strerror}), "
            "without which two processes would write the same files: use a local disk, or mount it with locks (Lustre: "
            "`-o flock`)"
        ) from error


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock on a file, which is made where it is absent and is left there.

    ``waiting`` is called once if another process holds the lock.

    Raises:
        OSError: The file can't be opened for writing.
        FileSystemError: The file system has no locks.
    """
    with path.open("w") as stream:
        try:
            flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock on a file and give True; give False at once if another process holds it.

    Raises:
        OSError, FileSystemError: As `locked`.
    """
    with path.open("w") as stream:
        is_free = True
        try:
            flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_free = False
        yield is_free


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on a file; False if there is no file."""
    try:
        with path.open("r+") as stream:
            flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False
