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

from pipeline.errors import WorkerFailed
from pipeline.settings import Settings
from pipeline.workers.launchers.local import Local, how_it_ended
from pipeline.workers.launchers.task import LOG, LOG_BYTES, OUTPUT, RESULT, RESULT_BYTES, Launcher, Task
from registry import untrusted
from registry.progress import Progress

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
        what it reads. ``folder`` is its working folder and holds result.json and output.log afterwards. The worker is
        given an allowlist of the environment, so no secret of the orchestrator; what else it could see of it says
        `pipeline.workers.launchers.confinement`.

        Raises:
            WorkerFailed: it said what was wrong, or ended without a result.
            UntrustedFileError: it left something else than regular files, or a result that is too large.
        """
        with self.bootstrap(folder) as variables:
            ended = self.launcher(Task(environment, script, request, folder, variables, self.stop))
        self.seconds.append(ended.seconds)
        if request.get(OUTPUT):  # from here on nobody writes there, and who reads needs no further care
            untrusted.plain_files(Path(request[OUTPUT]))
        return self._result(environment, script, ended.status, folder)

    def _result(self, environment: str, script: Path, status: int, folder: Path) -> dict[str, Any]:
        outcome = _outcome(folder)
        if status == 0 and isinstance(outcome.get("result"), dict):
            return dict(outcome["result"])
        kept = self._keep_log(f"{script.stem}-{environment}", folder)
        if "error" in outcome:
            raise WorkerFailed(f"{outcome['error']} (full output: {kept})")
        tail = kept.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        raise WorkerFailed("\n".join([f"worker {script.stem} {how_it_ended(status)}; full output: {kept}", *tail]))

    def _keep_log(self, name: str, folder: Path) -> Path:
        logs = self.settings.home / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        kept = logs / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{name}-{os.getpid()}.log"
        with untrusted.open_file(folder, LOG, LOG_BYTES) as log, kept.open("wb") as copy:
            shutil.copyfileobj(log, copy)
        return kept


def _outcome(folder: Path) -> dict[str, Any]:
    """What a worker wrote into its result file: nothing where there is none.

    Raises:
        WorkerFailed: it is no JSON object.
    """
    try:
        outcome = json.loads(untrusted.read(folder, RESULT, RESULT_BYTES))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise WorkerFailed(f"the worker's {RESULT} is not valid JSON: {error}") from error
    if not isinstance(outcome, dict):
        raise WorkerFailed(f"the worker's {RESULT} holds no JSON object")
    return outcome
