"""Locks that all Slipway processes of this machine share, whichever home and user they work for.

Two homes (two checkouts, two test workers) run on the same cores and GPUs, so these locks do not lie in a home. A lock
is an empty file in a folder that every user can write to, locked with flock(2): the kernel drops it however its process
ends. Such a folder is open to everybody, so a lock file is opened without following a link, must be a regular file, and
is never written to. Any user can hold a lock for as long as he likes: he delays others and reads or changes nothing.

Processes in a container with a /run/lock of its own exclude each other only: give them one folder by ``SLIPWAY_LOCKS``.
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
# Debian and Ubuntu give everybody /run/lock, which is emptied at boot alone; Fedora gives it to root. TMPDIR is not
# asked: it may be another for each user.
_CANDIDATES = (Path("/run/lock"), Path("/tmp"))  # noqa: S108 - opened as the module's docstring says
_FOR_EVERYBODY = stat.S_ISVTX | stat.S_IWOTH


class MachineLockError(ContainerError):
    """A lock file can't be opened; the message says which, why, and what to set."""


def default_folder(candidates: tuple[Path, ...] = _CANDIDATES) -> Path:
    """Return the first folder that every user can write to, and in which none can remove another's files.

    The choice does not depend on who asks, so that root and an ordinary user meet in one folder.
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
    """Hold the lock ``name`` of ``folder``, exclusively unless ``shared`` with others that say the same.

    ``waiting`` is called once where somebody else's lock stands in the way.

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
    """Lock ``name`` and return the descriptor that holds it until it is closed; None where somebody else has it.

    Raises:
        MachineLockError: the file can't be opened or is not a regular file.
        FileSystemError: the folder's file system has no locks.
    """
    try:
        return _lock(folder / name, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return None


def _lock(path: Path, operation: int) -> int:
    """Lock the file that has this name: one that was removed while we waited excludes nobody."""
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
    """Open a lock file for reading, which is enough to lock it, after making it where there is none."""
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
    """Make an empty file that every user can open, whole at once: under a name of its own first."""
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
