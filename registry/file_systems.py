"""Locks, modes and synced folders on file systems that lack them: Lustre, CIFS, object storage mounted as folders.

Where nothing is lost without one it is left out: a folder that can't be synced (CIFS: EINVAL) keeps its names as well
as its server does, and a mode that can't be set (gcsfuse: EPERM) is the mount's own for every file. Without locks
(Lustre without ``-o flock``: ENOSYS) two processes would write the same files, so that is an error of its own.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

from registry.errors import FileSystemError

_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY})
_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL})


def flock(file: IO[bytes] | IO[str] | int, operation: int) -> None:
    """Lock a file, as `fcntl.flock` does.

    Raises:
        BlockingIOError: another process holds it, and ``operation`` has ``LOCK_NB``.
        FileSystemError: its file system has no locks.
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


def sync_folder(folder: Path) -> None:
    """Push a folder's list of names to the disk, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def set_mode(file: Path | int, mode: int) -> None:
    """Change a file's mode, where its file system has modes; for what no secret depends on."""
    try:
        os.chmod(file, mode)  # noqa: PTH101 - a descriptor, too
    except OSError as error:
        if error.errno not in _UNSUPPORTED | {errno.EPERM}:
            raise
