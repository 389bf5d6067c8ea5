"""Which process of which home and machine started a container, and whether that process still runs.

Besides the container's labels, a marker file is in the home while a container is in use, so that every command can
check cheaply whether orphaned containers must be removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

HOME_LABEL = "slipway.home"
HOST_LABEL = "slipway.host"
OWNER_LABEL = "slipway.owner"
_MARKERS = "sandbox"


def home_digest(home: Path) -> str:
    """Return twelve hex digits that identify a home's containers on a shared engine."""
    return hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:12]


def ownership(home: Path) -> dict[str, str]:
    """Return the labels of containers and networks that this process creates for a home."""
    return {
        HOME_LABEL: home_digest(home),
        HOST_LABEL: socket.gethostname(),
        OWNER_LABEL: f"{os.getpid()}:{start_time(os.getpid())}",
    }


def start_time(pid: int) -> str | None:
    """Return a process's start in clock ticks since boot (proc(5), field 22); a later process with its id differs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in {"Z", "X"} else fields[19]


def is_alive(owner: str) -> bool:
    """Return whether the process in an owner label still runs."""
    pid, _, started = owner.partition(":")
    return pid.isdecimal() and start_time(int(pid)) == started


@contextlib.contextmanager
def marked(home: Path, name: str) -> Iterator[None]:
    """Keep a marker in the home during the block."""
    marker = home / _MARKERS / name
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(f"{socket.gethostname()} {ownership(home)[OWNER_LABEL]}")
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)


def left_behind(home: Path) -> list[Path]:
    """Return the markers of processes on this machine that have ended."""
    found = []
    for marker in (home / _MARKERS).glob("*"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            host, _, owner = marker.read_text().partition(" ")
            if host == socket.gethostname() and owner and not is_alive(owner):
                found.append(marker)
    return found
