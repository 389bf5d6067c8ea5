"""Lines that a worker writes into a file while it runs, read by a handle that was opened before it began."""

from __future__ import annotations

import os
from collections.abc import Iterator
from threading import Event

_POLL_SECONDS = 0.05
_CHUNK = 1 << 16
# A message is a line; a run's are some thousands.
_LONGEST, _MOST = 1 << 20, 64 << 20


def lines(descriptor: int, ended: Event) -> Iterator[bytes]:
    """Give whole lines as they come, until ``ended`` is set and all was read.

    Raises:
        ValueError: A line is longer than 1 MiB, or all of them than 64 MiB.
    """
    rest, total = b"", 0
    while True:
        last = ended.is_set()  # asked before reading, so that what was written last is read
        while chunk := os.read(descriptor, _CHUNK):
            total += len(chunk)
            *whole, rest = (rest + chunk).split(b"\n")
            yield from whole
            if len(rest) > _LONGEST or total > _MOST:
                raise ValueError(f"more than {_LONGEST} bytes in a line, or {_MOST} in all")
        if last:
            return
        ended.wait(_POLL_SECONDS)
