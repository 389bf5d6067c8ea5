"""The temporary folder beside a destination: a release is assembled in it, and then renamed to the destination.

It is named after the destination and the release, and locked by who fills it; the kernel drops the lock with its
process. What a killed pull left in it the next pull of the same release goes on with, and that of another sweeps away.
Everybody can tell that name in advance, and make such a folder first where anybody may write. So one that is there
already is gone on with only where this user made all of it, nobody else may write to it, and it holds no links.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from registry import untrusted
from registry.errors import DiskError, FileSystemError, PullError, UntrustedFileError
from registry.file_locks import flock
from registry.file_systems import sync_folder
from registry.progress import Progress

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def folder_beside(destination: Path, digest: str, progress: Progress) -> Iterator[Path]:
    """Give the folder for the release ``digest``; on an error what is in it stays for the next try, if it is anything.

    Raises:
        DiskError: Nothing can be written there.
    """
    made = [folder for folder in (destination.parent, *destination.parent.parents) if not folder.exists()]
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        part, descriptor = _taken(destination, digest, progress)
        try:
            yield part
        finally:
            if part.exists() and not any(path.is_file() for path in part.rglob("*")):
                shutil.rmtree(part, ignore_errors=True)
            os.close(descriptor)
    except OSError as error:
        raise DiskError(f"can't write `{destination}`: {error.strerror or error}") from error
    finally:
        if not os.path.lexists(destination):
            remove_empty(made)


def discard(part: Path) -> None:
    """Remove the folder."""
    shutil.rmtree(part, ignore_errors=True)


def take_place(part: Path, destination: Path, *, replace: bool) -> None:
    """Rename the finished folder to the destination, atomically.

    With ``replace`` it changes places with what is there, in one step where the file system can (Linux,
    ``RENAME_EXCHANGE``), and that is then removed; a process that has it open keeps what it has. A symlink is replaced,
    what it points to is kept.

    Raises:
        PullError: Without ``replace``, the destination appeared meanwhile.
        OSError: A folder can't be renamed.
    """
    if replace and os.path.lexists(destination):
        if not _exchange(part, destination):
            aside = part.with_name(part.name + ".old")
            _remove(aside)
            destination.rename(aside)
            part.rename(destination)
            part = aside
        sync_folder(destination.parent)
        _remove(part)
        return
    try:
        part.rename(destination)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise PullError(f"`{destination}` appeared meanwhile: {error.strerror}") from error
    sync_folder(destination.parent)


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the deepest first, up to one that is not empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def is_empty(folder: Path) -> bool:
    """Whether this is an empty folder."""
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def _taken(destination: Path, digest: str, progress: Progress) -> tuple[Path, int]:
    """Lock the folder; without locks on the file system, make one with a random name."""
    try:
        return _locked(destination, digest, progress)
    except FileSystemError:
        part = destination.with_name(f".{destination.name}.part-{secrets.token_hex(16)}")
        part.mkdir(mode=0o700)
        progress(f"the file system of {destination} has no locks: a pull that is broken off there starts anew")
        return part, os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)


def _locked(destination: Path, digest: str, progress: Progress) -> tuple[Path, int]:
    """Make or find the folder and lock it; wait where another pull of the same release fills it."""
    prefix = f".{destination.name}.part-"
    part = destination.with_name(prefix + digest.rpartition(":")[2][:16])
    reported = False
    while True:
        parent = os.open(destination.parent, os.O_RDONLY)
        try:
            flock(parent, fcntl.LOCK_EX)  # no other pull removes the folder before it is locked
            for leftover in destination.parent.glob(f"{glob.escape(prefix)}*"):
                if leftover != part:
                    _remove_if_dead(leftover)
            made = _made(part)
            if not made and not _is_ours(part):
                part = _without(part)
                continue
            descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                if made or _holds_ours_alone(part):
                    return part, descriptor
                os.close(descriptor)
                part = _without(part)
                continue
        finally:
            os.close(parent)
        if not reported:
            progress("waiting for another pull of the same release to the same place")
            reported = True
        flock(descriptor, fcntl.LOCK_EX)
        os.close(descriptor)  # it may be another folder's by now: look again


def _made(part: Path) -> bool:
    """Make the folder; False where something has its name already."""
    try:
        part.mkdir(mode=0o700)
    except FileExistsError:
        return False
    return True


def _is_ours(part: Path) -> bool:
    """Whether this user owns the folder and no other user may write to it."""
    about = part.lstat()
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & _OTHERS_WRITE


def _holds_ours_alone(part: Path) -> bool:
    """Whether a folder contains only folders and regular files that this user owns."""
    try:
        untrusted.plain_files(part)
        return all(path.lstat().st_uid == os.geteuid() for path in part.rglob("*"))
    except (OSError, UntrustedFileError):
        return False


def _without(part: Path) -> Path:
    """Remove what has the folder's name; if it can't be removed, return a random name instead."""
    _remove(part)
    return part.with_name(f"{part.name}-{secrets.token_hex(8)}") if os.path.lexists(part) else part


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _remove_if_dead(part: Path) -> None:
    try:
        descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:
        return  # gone, or none of ours
    try:
        flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(part, ignore_errors=True)
    except (BlockingIOError, FileSystemError):
        pass  # another pull is filling it, or may be
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically; False if the system or the file system can't."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))
