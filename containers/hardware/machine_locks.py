"""Locks shared by all Slipway processes of this machine, of every home and user.

Homes (two checkouts, two test workers) share cores and GPUs, so these locks are outside of homes. A lock is an empty
file in a folder that every user can write to, locked with flock(2), which the kernel drops when the process ends.
Because the folder is open to all users, a lock file is opened without following links, must be a regular file, and is
never written to. A user who holds a lock can delay others but can read or change nothing.

Processes in a container with its own /run/lock share locks only among themselves: set ``SLIPWAY_LOCKS`` to one folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from containers.errors import ContainerError
from registry.file_locks import flock

DEVICE = "slipway-device.lock"
CORES = "slipway-cores.lock"
PACKAGES = "slipway-packages.lock"
# On Debian and Ubuntu every user can write to /run/lock, which is emptied only at boot; on Fedora only root can.
# TMPDIR is not used: it may differ between users.
_CANDIDATES = (Path("/run/lock"), Path("/tmp"))  # noqa: S108 - opened as the module's docstring says
_FOR_EVERYBODY = stat.S_ISVTX | stat.S_IWOTH


class MachineLockError(ContainerError):
    """A lock file can't be opened; the message says which, why, and what to set."""


def default_folder(candidates: tuple[Path, ...] = _CANDIDATES) -> Path:
    """Return the first folder that every user can write to and that is sticky (users can't remove others' files).

    The choice is the same for root and other users.
    """
    for folder in candidates:
        with contextlib.suppress(OSError):
            if folder.stat().st_mode & _FOR_EVERYBODY == _FOR_EVERYBODY:
                return folder
    return Path(tempfile.gettempdir())


@contextlib.contextmanager
def locked(
    folder: Path, name: str, waiting: Callable[[], None] = lambda: None, *, shared: bool = False
) -> Iterator[None]:
    """Hold the lock ``name`` of ``folder`` during the block, exclusively or ``shared``.

    ``waiting`` is called once if the lock is held by another process.

    Raises:
        MachineLockError: the file can't be opened or is not a regular file.
        FileSystemError: the folder's file system has no locks.
    """
    descriptor = try_lock(folder, name, shared=shared)
    if descriptor is None:
        waiting()
        descriptor = _lock(folder / name, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def try_lock(folder: Path, name: str, *, shared: bool = False) -> int | None:
    """Lock ``name`` and return the descriptor that holds it until closed; None if another process holds it.

    Raises:
        MachineLockError: the file can't be opened or is not a regular file.
        FileSystemError: the folder's file system has no locks.
    """
    try:
        return _lock(folder / name, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return None


def _lock(path: Path, operation: int) -> int:
    """Lock the file with this name; lock again if the file was removed or replaced while waiting."""
    while True:
        descriptor = _opened(path)
        try:
            flock(descriptor, operation)
            if _is_still(path, descriptor):
                return descriptor
        except BaseException:  # Ctrl-C while it waits among them: an open descriptor would keep the lock
            os.close(descriptor)
            raise
        os.close(descriptor)


def _opened(path: Path) -> int:
    """Open a lock file for reading, which is enough to lock it; create it if it is missing."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            _make(path)
            continue
        except OSError as error:
            why = "it is a link" if error.errno == errno.ELOOP else str(error.strerror)
            raise _refusal(path, why) from error
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise _refusal(path, "it is not a regular file")


def _make(path: Path) -> None:
    """Create an empty file that every user can open, atomically: under a temporary name, then linked."""
    try:
        descriptor, made = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            os.fchmod(descriptor, 0o644)
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.link(made, path)
        finally:
            os.close(descriptor)
            Path(made).unlink()
    except OSError as error:
        raise _refusal(path, str(error.strerror)) from error


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _refusal(path: Path, why: str) -> MachineLockError:
    return MachineLockError(
        f"can't lock {path}: {why}; remove it, or set SLIPWAY_LOCKS to one folder for all users who run "
        "Slipway on this machine (mode 1777)"
    )
