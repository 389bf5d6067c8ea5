"""Workers in containers of this machine's engine: the same files under the same paths, no network, nothing else.

The container has the worker's pinned environment and this machine's Python beside what it reads, all of it read-only,
so that its image holds no more than the system's libraries; without one in the settings, that is the base of the CPU
runtime, made here. Dagster's own client for containers (`PipesDockerClient`) knows no engine but the environment's, and
leaves its containers behind.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from containers.engine.engine import connect
from containers.image import profile
from containers.image.base import ensure_base
from containers.sandbox import job
from pipeline.settings import Settings
from pipeline.workers.environments import ensure_environment
from pipeline.workers.launchers.local import worker_environment
from pipeline.workers.launchers.placement import Container
from pipeline.workers.launchers.task import LOG, OUTPUT, Ended, Task
from registry.atomic_write import write_atomically
from registry.progress import Progress

_BASE_OF = "vllm-cpu"


class Containers:
    """Runs workers in containers."""

    def __init__(self, where: Container, settings: Settings, progress: Progress) -> None:
        """Connect to the engine only when there is something to run."""
        self.where = where
        self.settings = settings
        self.progress = progress

    def __call__(self, task: Task) -> Ended:
        """Run the worker in a container, which is removed.

        Raises:
            ContainerError: no engine answers, or it can't run the container.
        """
        folder = task.folder
        python = ensure_environment(task.environment, self.settings, self.progress) / "bin" / "python"
        write_atomically(folder / "request.json", json.dumps(task.request, default=os.fspath))
        files = ("--request", str(folder / "request.json"), "--result", str(folder / "result.json"))
        reads = {python.parents[1], task.script.parent, *_interpreter(), *_read(task.request)}
        output = task.request.get(OUTPUT)
        client = connect(self.settings.docker_host, self.settings.home)
        try:
            image = (
                self.where.image
                or ensure_base(client, profile.load(_BASE_OF), self.settings.home, self.progress).reference
            )
            started = time.monotonic()
            status = job.run(
                client,
                image,
                [str(python), str(task.script), *files],
                name=f"slipway-worker-{task.script.stem}",
                home=self.settings.home,
                folder=folder,
                reads=sorted(reads),
                writes=[folder, *([Path(output)] if output else [])],
                environment={**worker_environment(self.settings, python, folder), **task.variables},
                log=LOG,
                memory_bytes=self.where.memory,
                gpus=self.where.gpus,
            )
        finally:
            client.close()
        return Ended(status, time.monotonic() - started)


def _interpreter() -> list[Path]:
    """Where this machine's Python is, which environments are made of; one of the system's is the image's own."""
    return [] if Path(sys.base_prefix) == Path("/usr") else [Path(sys.base_prefix)]


def _read(request: Any, key: str | None = None) -> Iterator[Path]:  # noqa: ANN401 - any JSON value
    """Every file and folder that a request names to be read, and what links in such a folder lead to."""
    if isinstance(request, Path) and key != OUTPUT:
        yield request
        links = [path for path in request.rglob("*") if path.is_symlink()] if request.is_dir() else []
        yield from {link.resolve().parent for link in links}
    elif isinstance(request, dict):
        for name, value in request.items():
            yield from _read(value, name)
    elif isinstance(request, list | tuple):
        for value in request:
            yield from _read(value)
