"""Processes of workers as this machine sees them; their own numbers are those of their PID namespaces."""

from __future__ import annotations

import os
import time
from pathlib import Path


def of_script(script: Path) -> list[int]:
    """Every living process of a worker whose script has this name."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")  # empty once it has ended
        except OSError:
            continue
        if b"--request" in arguments and any(Path(os.fsdecode(each)).name == script.name for each in arguments):
            found.append(int(entry.name))
    return found


def wait_until_gone(script: Path) -> None:
    """Wait until no process of a worker with this script is left."""
    deadline = time.monotonic() + 30
    while found := of_script(script):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
