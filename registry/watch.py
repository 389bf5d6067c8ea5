"""Following an alias: pull each release that it comes to name and hand it to a callback."""

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
    deliver: Callable[[Pulled], bool],
    *,
    every: float,
    stopped: threading.Event,
    tracking_uri: str,
    trusted_keys: Trust,
    required_gates: Sequence[str] | None = None,
    cache: Path | None = None,
    variant: str | None = None,
    progress: Progress = silent,
) -> None:
    """Call ``deliver`` with each release that the destination comes to hold, including the first.

    The alias is checked every ``every`` seconds until ``stopped``. If ``deliver`` returns False (it could not use the
    release), it is called again at the next check. Every failure of the registry, a release that is not what was signed
    included, is reported to ``progress`` and tried again, and the destination stays as it was: an attack that lasted
    for a while must not stop deployments for good.

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
                cache=cache, replace=True, variant=variant, progress=progress,
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
                used = digest if deliver(pulled) else None
        stopped.wait(every)


def run(command: Sequence[str], pulled: Pulled) -> int:
    """Run a command with the release's folder and digest behind its arguments; return its exit status."""
    return subprocess.run([*command, str(pulled.folder), pulled.report.manifest_digest], check=False).returncode
