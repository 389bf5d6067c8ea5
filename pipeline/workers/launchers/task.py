"""One run of a worker, and what carries it out."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

# The request's key under which a worker is given an empty folder to fill; every other path is one that it reads.
OUTPUT = "output"
# The file in a task's folder in which Dagster Pipes finds what its worker reports.
MESSAGES = "messages.jsonl"
# The files in a task's folder that hold what its worker printed, and what it gave.
LOG, RESULT = "output.log", "result.json"
# The most bytes that are read of either; results are small documents.
LOG_BYTES, RESULT_BYTES = 256 << 20, 16 << 20


@dataclass(frozen=True)
class Task:
    """A script, the environment that it runs in, and what it is asked.

    A `Path` in ``request`` names files: see `OUTPUT`. ``folder`` is the worker's own; ``variables`` are added to its
    environment. Who sets ``stop``, from another thread than the one that waits for the worker, has it ended.
    """

    environment: str
    script: Path
    request: Mapping[str, Any]
    folder: Path
    variables: Mapping[str, str]
    stop: threading.Event = field(default_factory=threading.Event, compare=False)


@dataclass(frozen=True)
class Ended:
    """A worker's exit status, negative where a signal ended it, and the seconds that it took."""

    status: int
    seconds: float


class Launcher(Protocol):
    """What runs a worker to its end."""

    def __call__(self, task: Task) -> Ended:
        """Leave ``output.log`` in the task's folder, ``result.json`` where there is one, and its output in its place.

        Whatever is raised meanwhile, nothing of the worker is left.
        """
        ...
