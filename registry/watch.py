"""Following an alias: pull when it names another release, tell a command, go on."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from registry.errors import ArgumentError, DiskError, NotFoundError, RegistryError, TrackingError, TrustPolicyError
from registry.policy import Trust
from registry.progress import Progress, silent
from registry.pull import Pulled, pull


def watch(
    reference: str,
    destination: Path,
    tell: Callable[[Pulled], bool],
    *,
    every: float,
    stopped: threading.Event,
    tracking_uri: str,
    trusted_keys: Trust,
    required_gates: Sequence[str] | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
) -> None:
    """Call ``tell`` with each release that the destination comes to hold, the first one as soon as it is there.

    It looks every ``every`` seconds, until ``stopped``. A release of which ``tell`` says False, that it could not be
    used, is told again at the next look. Whatever a registry does or sends, a release that is not what was signed among
    it, is told to ``progress`` and looked at again, the destination as it was: a registry that was attacked for a while
    must not stop its deployments for good.

    Raises:
        ArgumentError: The reference or the destination can't be used as it was given.
        PolicyError: The policy can't be read.
    """
    waiting, used = "", None
    while not stopped.is_set():
        try:
            pulled = pull(
                reference, destination,
                tracking_uri=tracking_uri, trusted_keys=trusted_keys, required_gates=required_gates,
                cache=cache, replace=True, progress=progress,
            )  # fmt: skip
        except (ArgumentError, TrustPolicyError):
            raise
        except RegistryError as error:
            if str(error) != waiting:
                passing = isinstance(error, (TrackingError, NotFoundError, DiskError))
                progress(f"{'waiting' if passing else 'refused'}: {error}")
            waiting = str(error)
        else:
            waiting, digest = "", pulled.report.manifest_digest
            if not pulled.already_there or digest != used:
                used = digest if tell(pulled) else None
        stopped.wait(every)


def run(command: Sequence[str], pulled: Pulled) -> int:
    """Run a command with the release's folder and digest behind its arguments; return its exit status."""
    return subprocess.run([*command, str(pulled.folder), pulled.report.manifest_digest], check=False).returncode
