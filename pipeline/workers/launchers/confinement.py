"""Confines worker processes of this machine, so that they see no other process and no other environment variables.

A process can read the environment of every process of the same user in ``/proc/PID/environ``, including credentials
that were set when that process started. So a worker gets its own PID namespace with its own ``/proc``, and no
capability to leave it. A worker of root keeps the capabilities for files and for its own priority; it can read and
write what root can, so untrusted code must run in a container instead.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from functools import cache

_PR_SET_DUMPABLE = 4  # linux/prctl.h
_KEPT = "-all,+chown,+dac_override,+fowner,+sys_nice"
_WITHOUT_PRIVILEGES = ("setpriv", "--no-new-privs")
_WITHOUT_CAPABILITIES = (*_WITHOUT_PRIVILEGES, "--inh-caps=-all", f"--bounding-set={_KEPT}")
_NAMESPACES = ("unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
_AS_ONESELF = ("--user", "--map-current-user")
# The first process of a PID namespace ignores signals without a handler, so the worker is the second.
_FIRST = ("sh", "-c", '"$@"; exit $?', "worker")


def confined(command: Sequence[str]) -> list[str]:
    """Return a command that runs ``command`` as confined as this machine permits; it ends when this process ends."""
    inner = _confinement()
    if "unshare" not in inner:
        # Without a namespace, processes without capabilities at least can't read this one if it is not dumpable.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    return ["setpriv", "--pdeathsig", "KILL", *inner, *command]


def is_hidden() -> bool:
    """Whether workers can't see the processes of this machine."""
    return "unshare" in _confinement()


def status_of(code: int) -> int:
    """A worker's exit status, negative if a signal ended it; the shell between reports signals as 128 + number."""
    return 128 - code if code > 128 else code


@cache
def _confinement() -> tuple[str, ...]:
    """The prefix of a worker's command: the strictest confinement that works on this machine."""
    if os.geteuid() == 0:
        candidates = [(*_NAMESPACES, *_WITHOUT_CAPABILITIES, *_FIRST), _WITHOUT_CAPABILITIES, _WITHOUT_PRIVILEGES]
    else:
        candidates = [(*_NAMESPACES, *_AS_ONESELF, *_WITHOUT_PRIVILEGES, *_FIRST), _WITHOUT_PRIVILEGES]
    return next((each for each in candidates if _works(each)), ())


def _works(prefix: Sequence[str]) -> bool:
    try:
        return subprocess.run([*prefix, "true"], capture_output=True, check=False, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
