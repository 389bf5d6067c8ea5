"""Downloads one file: resumes, hashes while streaming, and retries.

What a killed or broken download left is the beginning of the file, for it is written in order. The next one hashes that
beginning (at the disk's pace) and asks for the rest alone, by byte range, so that no more than the chunk in flight
crosses the network twice. Whatever the beginning was, the sum over all of it decides: where it is wrong, the file is
fetched once more from its first byte, and then given up.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from registry.errors import NetworkSettingError, Problem, PullError, TrackingError, VerificationError
from registry.manifest import FileRecord
from registry.network import Pace

CHUNK = 1 << 20
_ATTEMPTS = 6  # without a byte of progress between two of them
_FIRST_PAUSE = 0.2  # seconds; doubled with each attempt


class InterruptedStreamError(Exception):
    """The stream ended too soon, or the other side is busy: to be tried again."""


class Reader(Protocol):
    """Where bytes come from. It raises `InterruptedStreamError` for what may pass."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill the buffer, or some of it; 0 at the end."""
        ...


Open = Callable[[int], AbstractContextManager[tuple[Reader, int]]]
"""Opens a file from a byte on; gives the reader and the byte at which it truly starts, 0 where there are no ranges."""


@dataclass
class ByteCount:
    """How many bytes came over the network, over all of a pull."""

    bytes: int = 0

    def add(self, count: int) -> None:
        """Count more of them."""
        self.bytes += count


def download(name: str, target: Path, record: FileRecord, open_at: Open, moved: ByteCount) -> None:
    """Write the file to ``target``, which may hold its beginning, and make sure that it is ``record``.

    Raises:
        VerificationError: What came is not what the manifest says, twice.
        TrackingError: It could not be had.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for last in (False, True):
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            held = os.fstat(file.fileno()).st_size
            if held > record.size:
                file.truncate(held := 0)
            found = fill(name, file.fileno(), held, record.size, open_at, moved.add)
            if found == record.sha256:
                os.fsync(file.fileno())
                return
            file.truncate(0)
            if last or held == 0:
                break
    target.unlink(missing_ok=True)
    raise VerificationError(name, [Problem(name, "changed: another sha256 than in the manifest")])


def fill(name: str, descriptor: int, held: int, size: int, open_at: Open, moved: Callable[[int], None]) -> str:
    """Hash the ``held`` bytes that are there, stream the rest behind them, and return the SHA-256 of it all.

    Raises:
        TrackingError: The stream broke off too often, or was too slow; what came stays in the file.
    """
    buffer = memoryview(bytearray(CHUNK))
    total = hash_start(descriptor, held, buffer)
    attempt, at = 1, held
    pace = Pace()
    while at < size:
        before = at
        try:
            with open_at(at) as (reader, start):
                if start != at:  # the other side knows no ranges
                    at, total = start, hashlib.sha256()
                while at < size and (count := reader.readinto(buffer[: min(CHUNK, size - at)])):
                    _write(descriptor, buffer[:count], at)
                    total.update(buffer[:count])
                    at += count
                    moved(count)
                    keep(pace, name, count)
            why = f"it ended after {at} of {size} bytes"
        except InterruptedStreamError as error:
            why = str(error)
        if at < size:
            attempt = 1 if at > before else attempt + 1
            pause(name, attempt, why)
    os.ftruncate(descriptor, size)
    return total.hexdigest()


def keep(pace: Pace, name: str, count: int) -> None:
    """Count bytes of a file.

    Raises:
        TrackingError: They arrive too slowly.
    """
    try:
        pace.add(count)
    except NetworkSettingError as error:
        raise TrackingError(f"the server of `{name}` {error}") from error


def pause(name: str, attempt: int, why: str) -> None:
    """Wait before the next attempt to read on, longer each time.

    Raises:
        TrackingError: There were enough attempts without a byte of progress; ``why`` is in the message.
    """
    if attempt > _ATTEMPTS:
        raise TrackingError(f"`{name}` can't be fetched: {why}")
    time.sleep(_FIRST_PAUSE * 2**attempt * random.uniform(0.5, 1.0))  # noqa: S311 - spreads those who wait


def hash_start(descriptor: int, count: int, buffer: memoryview) -> hashlib._Hash:
    """Return the running SHA-256 of the first ``count`` bytes of an open file."""
    total, at = hashlib.sha256(), 0
    while at < count:
        got = os.preadv(descriptor, [buffer[: min(len(buffer), count - at)]], at)
        if not got:
            break
        total.update(buffer[:got])
        at += got
    return total


def _write(descriptor: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, at)
        data, at = data[count:], at + count


@contextmanager
def local(path: Path, start: int) -> Iterator[tuple[Reader, int]]:
    """Open a file of this machine, at byte ``start``, as an `Open`.

    Raises:
        PullError: It is a symlink.
        TrackingError: It can't be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise PullError(f"`{path}` is a symlink: a release holds plain files") from error
        raise TrackingError(f"`{path}` can't be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        file.seek(start)
        yield file, start
