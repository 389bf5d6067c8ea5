"""Modes and synced folders, also on file systems that lack them: CIFS, object storage mounted as folders.

A missing feature is ignored where nothing is lost without it. A folder that can't be synced (CIFS: EINVAL) keeps its
names as well as its server does. A mode that can't be set (gcsfuse: EPERM) is the mount's own for every file. For
locks see `registry.file_locks`.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY})


def sync_folder(folder: Path) -> None:
    """Write a folder's list of names to the disk, where its file system can.

    Raises:
        OSError: The disk refuses.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def set_mode(file: Path | int, mode: int) -> None:
    """Change a file's mode, where its file system has modes and this user may; for what no secret depends on.

    Raises:
        OSError: It fails for another reason.
    """
    try:
        os.chmod(file, mode)  # noqa: PTH101 - a descriptor, too
    except OSError as error:
        if error.errno not in _UNSUPPORTED | {errno.EPERM}:
            raise
