"""Reads the lines that a worker appends to a file, through a handle that was opened before the worker started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from threading import Event

_POLL_SECONDS = 0.05
_CHUNK = 1 << 16
# A message is one line; a run writes some thousands.
_LONGEST, _MOST = 1 << 20, 64 << 20


def lines(descriptor: int, ended: Event) -> Iterator[bytes]:
    """Yield whole lines as they are written, until ``ended`` is set and all are read.

    Raises:
        ValueError: A line is longer than 1 MiB, or all of them than 64 MiB.
    """
    rest, total = b"", 0
    while True:
        last = ended.is_set()  # checked before reading, so that the last lines are read too
        while chunk := os.read(descriptor, _CHUNK):
            total += len(chunk)
            *whole, rest = (rest + chunk).split(b"\n")
            yield from whole
            if len(rest) > _LONGEST or total > _MOST:
                raise ValueError(f"a line has more than {_LONGEST} bytes, or all lines have more than {_MOST}")
        if last:
            return
        ended.wait(_POLL_SECONDS)
