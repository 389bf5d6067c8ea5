"""Runs a worker script: writes its request, has a launcher run it, and reads its result or says why it failed."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import WorkerFailed
from pipeline.settings import Settings
from pipeline.workers.launchers.local import Local, how_it_ended
from pipeline.workers.launchers.remote_job import output_folder
from pipeline.workers.launchers.task import LOG, LOG_BYTES, OUTPUT, RESULT, RESULT_BYTES, Launcher, Task
from registry import untrusted
from registry.errors import first_problem
from registry.progress import Progress

Bootstrap = Callable[[Path], contextlib.AbstractContextManager[Mapping[str, str]]]

_TAIL_LINES = 20


class ResultFile(BaseModel):
    """A worker's ``result.json``, which `slipway_worker.main` writes: its ``result``, or the ``error`` of a failure.

    Each caller validates ``result`` with a model of its own. The other keys are for people who run a worker by hand.
    """

    model_config = ConfigDict(frozen=True)

    result: dict[str, object] | None = None
    error: str | None = None
    seconds: float | None = None
    max_rss_bytes: int | None = None


class Workers:
    """Runs worker scripts; to the stages a plain callable: (environment, script, request, scratch folder) → result.

    ``launcher`` decides where they run; the default is a process of this machine. ``bootstrap`` is entered around each
    run with its folder, and yields variables for the worker's environment (Dagster Pipes' session). Each run appends
    its duration to ``seconds``. Setting ``stop`` from another thread ends the worker that runs.
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

    def __call__(
        self, environment: str, script: Path, request: Mapping[str, object], folder: Path
    ) -> dict[str, object]:
        """Run ``script`` in ``environment`` and return its result.

        A `Path` in the request names files: under the key ``output`` an empty folder that the worker fills, elsewhere
        files that it reads. ``folder`` is its working folder, and holds result.json and output.log afterwards. The
        worker gets only an allowlist of this process's environment variables, and so none of its secrets;
        `pipeline.workers.launchers.confinement` says what else a worker on this machine could see.

        Raises:
            WorkerFailed: the worker reported an error, or ended without a valid result.
            UntrustedFileError: it left something other than regular files, or a result that is too large.
        """
        with self.bootstrap(folder) as variables:
            ended = self.launcher(Task(environment, script, request, folder, variables, self.stop))
        self.seconds.append(ended.seconds)
        if request.get(OUTPUT):  # the worker has ended, so its output needs no checks after this one
            untrusted.plain_files(output_folder(request))
        written = _read_result(folder)
        if ended.status == 0 and written.result is not None:
            return written.result
        kept = self._keep_log(f"{script.stem}-{environment}", folder)
        if written.error is not None:
            raise WorkerFailed(f"{written.error} (full output: {kept})")
        tail = kept.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        raise WorkerFailed(
            "\n".join([f"worker {script.stem} {how_it_ended(ended.status)}; full output: {kept}", *tail])
        )

    def _keep_log(self, name: str, folder: Path) -> Path:
        logs = self.settings.home / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        kept = logs / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{name}-{os.getpid()}.log"
        with untrusted.open_file(folder, LOG, LOG_BYTES) as log, kept.open("wb") as copy:
            shutil.copyfileobj(log, copy)
        return kept


def _read_result(folder: Path) -> ResultFile:
    """Read a worker's result file; one without any key where there is none.

    Raises:
        WorkerFailed: it is not a valid result file.
    """
    try:
        return ResultFile.model_validate_json(untrusted.read(folder, RESULT, RESULT_BYTES))
    except FileNotFoundError:
        return ResultFile()
    except ValidationError as error:
        raise WorkerFailed(f"the worker's {RESULT} is not valid: {first_problem(error)}") from error
