"""A worker's task, and the protocol of the launchers that run it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

# The request's key for the empty folder that the worker fills; it only reads every other path.
OUTPUT = "output"
# The file in a task's folder that holds the worker's messages for Dagster Pipes.
MESSAGES = "messages.jsonl"
# The files in a task's folder that hold the worker's output and its result.
LOG, RESULT = "output.log", "result.json"
# The most bytes that are read of each; results are small documents.
LOG_BYTES, RESULT_BYTES = 256 << 20, 16 << 20


@dataclass(frozen=True)
class Task:
    """A script, the environment that it runs in, and its request.

    A `Path` in ``request`` names files: see `OUTPUT`. ``folder`` is the worker's working folder; ``variables`` are
    added to its environment. Setting ``stop`` from another thread ends the worker.
    """

    environment: str
    script: Path
    request: Mapping[str, object]
    folder: Path
    variables: Mapping[str, str]
    stop: threading.Event = field(default_factory=threading.Event, compare=False)


@dataclass(frozen=True)
class Ended:
    """A worker's exit status, negative if a signal ended it, and its duration in seconds."""

    status: int
    seconds: float


class Launcher(Protocol):
    """Runs one task at a time, in a process, a container or a remote job."""

    def __call__(self, task: Task) -> Ended:
        """Run the worker to its end. Its ``output.log``, its ``result.json`` if any, and its output are then in place.

        No process of the worker is left, even if this raises.
        """
        ...
