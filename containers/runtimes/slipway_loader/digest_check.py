"""Compares the digest of a file with the manifest's while it is read, unless a mark of an earlier start vouches for it.

A mark is a file named by a digest, in a folder that whoever writes the weights must not reach. It says which file had
that digest, and when that file last changed. It counts while that is so, until the host boots. On the file systems in
`_VOUCHING` each write, truncation or replacement gives a file a new ``ctime``, which nobody can set back. A write
through a mapped page does so when the page is first written after it was synced to disk; so a file is synced before it
is hashed for a mark. Blocks that an ioctl exchanges with another file leave the ``ctime`` as it is: marks are for
weights that nothing else writes to once they were hashed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

from registry.atomic_write import write_atomically

_VOUCHING = frozenset({"ext4", "xfs"})
# Two changes within a tick of the kernel's clock have the same time. No tick is as long as this.
_TICK_NS = 1_000_000_000


class DigestCheck:
    """Of one open file; everything that is read of it goes through `update`, and then `problem` judges."""

    def __init__(self, file: int, sha256: str, marks: Path | None) -> None:
        """Decide whether to hash; ``marks`` is the folder with marks."""
        self._file, self._sha256 = file, sha256
        self._mark = None if marks is None else marks / sha256
        self._state = None if marks is None else _state(file)
        self._known = self._mark is not None and self._state is not None and _holds(self._mark, self._state)
        self._total = hashlib.sha256()
        if self._state is not None and not self._known:
            os.fsync(file)

    def update(self, part: bytes | memoryview) -> None:
        """Take in the next bytes."""
        if not self._known:
            self._total.update(part)

    def problem(self) -> str | None:
        """Say what is wrong with the file, now that all of it was read; mark it if nothing is."""
        unchanged = self._state is not None and _state(self._file) == self._state
        if self._known:
            return None if unchanged else "changed while it was read"
        if self._total.hexdigest() != self._sha256:
            return "changed: another sha256 than in the manifest"
        if self._mark is not None and self._state is not None and unchanged:
            with contextlib.suppress(OSError):  # without a mark, the next start hashes it again
                write_atomically(self._mark, self._state)
        return None


def _state(file: int) -> bytes | None:
    """Describe an open file so that every write gives another description; None if that can't be relied on."""
    found = os.fstat(file)
    if _file_system(found.st_dev) not in _VOUCHING or found.st_ctime_ns > time.time_ns() - _TICK_NS:
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {found.st_dev} {found.st_ino} {found.st_size} {found.st_ctime_ns}\n".encode("ascii")


def _holds(mark: Path, state: bytes) -> bool:
    try:
        with mark.open("rb") as file:
            return file.read(len(state) + 1) == state
    except OSError:
        return False


def _file_system(device: int) -> str:
    """The type of a mounted file system, by its device number."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split()
        if fields[2] == number:
            return fields[fields.index("-") + 1]
    return ""
