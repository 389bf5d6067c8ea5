"""Following an alias: pull when it names another release, tell a command, go on."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from registry.errors import NotFoundError, TrackingError
from registry.policy import Trust
from registry.pull import Pulled, pull


def watch(
    reference: str,
    destination: Path,
    *,
    every: float,
    stopped: threading.Event,
    tracking_uri: str,
    trusted_keys: Trust,
    required_gates: Sequence[str] | None = None,
    cache: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Pulled]:
    """Yield each release that the destination comes to hold, the first one as soon as it is there; until ``stopped``.

    It looks every ``every`` seconds. What passes (no server, no such alias yet) is told to ``progress`` and looked at
    again; a release that is not what was signed ends the watch, the destination as it was.

    Raises:
        RegistryError: As `registry.pull.pull`, but for what passes.
    """
    told, last = "", None
    while not stopped.is_set():
        try:
            pulled = pull(
                reference, destination,
                tracking_uri=tracking_uri, trusted_keys=trusted_keys, required_gates=required_gates,
                cache=cache, replace=True, progress=progress,
            )  # fmt: skip
        except (TrackingError, NotFoundError) as error:
            if str(error) != told:
                progress(f"waiting: {error}")
            told = str(error)
        else:
            told = ""
            if pulled.report.manifest_digest != last:
                last = pulled.report.manifest_digest
                yield pulled
        stopped.wait(every)


def run(command: Sequence[str], pulled: Pulled) -> int:
    """Run a command with the release's folder and digest behind its arguments; return its exit status."""
    return subprocess.run([*command, str(pulled.folder), pulled.report.manifest_digest], check=False).returncode
