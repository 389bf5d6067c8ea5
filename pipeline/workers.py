"""Running a worker script: what it is asked, where it runs, and what it gave or how it failed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.environments import Progress
from pipeline.errors import WorkerFailed
from pipeline.launchers.local import Local, how_it_ended
from pipeline.launchers.task import Launcher, Task
from pipeline.settings import Settings

Bootstrap = Callable[[Path], contextlib.AbstractContextManager[Mapping[str, str]]]

_TAIL_LINES = 20


class Workers:
    """Runs worker scripts; a plain callable to the stages (environment, script, request, scratch folder) → result.

    ``launcher`` decides where: a process of this machine, if none is given. ``bootstrap`` is entered around each run,
    with its folder, and gives variables for the worker's environment (Dagster Pipes' session); each run adds its
    seconds to ``seconds``. Who sets ``stop``, from another thread, has what runs ended.
    """

    def __init__(
        self,
        settings: Settings,
        progress: Progress,
        seconds: list[float] | None = None,
        bootstrap: Bootstrap = lambda _: contextlib.nullcontext({}),
        launcher: Launcher | None = None,
    ) -> None:
        """Bind the runner to one stage of one run."""
        self.settings = settings
        self.seconds = seconds if seconds is not None else []
        self.bootstrap = bootstrap
        self.launcher = launcher or Local(settings, progress)
        self.stop = threading.Event()

    def __call__(self, environment: str, script: Path, request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Run ``script`` in ``environment`` and return its result.

        A `Path` in the request names files: under the key ``output`` an empty folder that the worker fills, elsewhere
        what it reads. ``folder`` is its working folder and holds result.json and output.log afterwards. The worker sees
        an allowlist of the environment, so no secret of the orchestrator.

        Raises:
            WorkerFailed: it said what was wrong, or ended without a result.
        """
        with self.bootstrap(folder) as variables:
            ended = self.launcher(Task(environment, script, request, folder, variables, self.stop))
        self.seconds.append(ended.seconds)
        return self._result(environment, script, ended.status, folder)

    def _result(self, environment: str, script: Path, status: int, folder: Path) -> dict[str, Any]:
        result = folder / "result.json"
        outcome = json.loads(result.read_text()) if result.exists() else {}
        if status == 0 and "result" in outcome:
            return dict(outcome["result"])
        kept = self._keep_log(f"{script.stem}-{environment}", folder / "output.log")
        if "error" in outcome:
            raise WorkerFailed(f"{outcome['error']} (full output: {kept})")
        tail = kept.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        raise WorkerFailed("\n".join([f"worker {script.stem} {how_it_ended(status)}; full output: {kept}", *tail]))

    def _keep_log(self, name: str, log: Path) -> Path:
        logs = self.settings.home / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        kept = logs / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{name}-{os.getpid()}.log"
        shutil.copyfile(log, kept)
        return kept
