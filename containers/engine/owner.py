"""Who started a container: a process of a home on a machine, and whether it still lives to remove it.

Beside the labels a marker lies in the home while a sandbox is open, so that any command sees at the cost of one look
whether there is something to sweep.
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
    """Twelve hex digits that tell this home's containers from another's on the same engine."""
    return hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:12]


def ownership(home: Path) -> dict[str, str]:
    """The labels of what this process starts for a home."""
    return {
        HOME_LABEL: home_digest(home),
        HOST_LABEL: socket.gethostname(),
        OWNER_LABEL: f"{os.getpid()}:{start_time(os.getpid())}",
    }


def start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot (proc(5), field 22): tells it from a later one with its id."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in {"Z", "X"} else fields[19]


def is_alive(owner: str) -> bool:
    """Whether the process of an owner's label still runs."""
    pid, _, started = owner.partition(":")
    return pid.isdecimal() and start_time(int(pid)) == started


@contextlib.contextmanager
def marked(home: Path, name: str) -> Iterator[None]:
    """Have a marker in the home for the time of the block."""
    marker = home / _MARKERS / name
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(f"{socket.gethostname()} {ownership(home)[OWNER_LABEL]}")
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)


def left_behind(home: Path) -> list[Path]:
    """The markers of sandboxes whose process, of this machine, did not live to close them."""
    found = []
    for marker in (home / _MARKERS).glob("*"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            host, _, owner = marker.read_text().partition(" ")
            if host == socket.gethostname() and owner and not is_alive(owner):
                found.append(marker)
    return found
