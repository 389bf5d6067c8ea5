"""What a worker process of this machine is held in, so that it sees no other process and none of their environments.

A process may read the environment of every other that runs as the same user, in ``/proc/PID/environ``, where the
operator's credentials stand as they were when that process began, whatever it removed since. So a worker gets a PID
namespace with a ``/proc`` of its own, and no capability to leave it. As root it keeps those that only concern files and
its own priority: it reads and writes what root may, and so must not be a stranger's code; containers are for that.
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
# The first process of a PID namespace is deaf to signals that it has no handler for: the worker is the second.
_FIRST = ("sh", "-c", '"$@"; exit $?', "worker")


def confined(command: Sequence[str]) -> list[str]:
    """Return the command that runs ``command`` as far from this process as the machine permits, and dies with it."""
    inner = _confinement()
    if "unshare" not in inner:
        # Without a namespace, what is not dumpable is at least not read by a process that has lost its capabilities.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    return ["setpriv", "--pdeathsig", "KILL", *inner, *command]


def is_hidden() -> bool:
    """Whether workers can't see the processes of this machine."""
    return "unshare" in _confinement()


def status_of(code: int) -> int:
    """The exit status of a worker, negative where a signal ended it; the process between says that as a shell does."""
    return 128 - code if code > 128 else code


@cache
def _confinement() -> tuple[str, ...]:
    """What stands before a worker's command: the strictest of what works here."""
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
