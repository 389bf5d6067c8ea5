"""Workers as processes of this machine. Each ends when the process that started it ends, even if that is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

from pipeline.errors import WorkerFailed
from pipeline.settings import Settings
from pipeline.workers.environments import ensure_environment
from pipeline.workers.launchers.confinement import confined, is_hidden, status_of
from pipeline.workers.launchers.task import LOG, RESULT, Ended, Task
from registry import untrusted
from registry.atomic_write import write_atomically
from registry.progress import Progress

# How often a task's `stop` is checked.
_CHECK_SECONDS = 0.5


class Local:
    """The launcher that runs workers as processes of this machine."""

    def __init__(self, settings: Settings, progress: Progress) -> None:
        """Use the environments in the settings' home; missing ones are made when a worker starts."""
        self.settings = settings
        self.progress = progress

    def __call__(self, task: Task) -> Ended:
        """Run the worker in its own process group and, if the machine permits it, its own PID namespace.

        Raises:
            WorkerFailed: the task was stopped.
        """
        folder = task.folder
        python = ensure_environment(task.environment, self.settings, self.progress) / "bin" / "python"
        write_atomically(folder / "request.json", json.dumps(task.request, default=os.fspath))
        files = ("--request", str(folder / "request.json"), "--result", str(folder / RESULT))
        command = confined([str(python), str(task.script), *files])
        if not is_hidden():
            self.progress(
                "this machine permits no PID namespace: workers see its processes and can read their environments"
            )
        started = time.monotonic()
        with untrusted.create_file(folder, LOG) as log:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**worker_environment(self.settings, python, folder), **task.variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                _wait(process, task)
            finally:
                _end_group(process)
        return Ended(status_of(process.returncode), time.monotonic() - started)


def worker_environment(settings: Settings, python: Path, folder: Path) -> dict[str, str]:
    """The environment variables of a worker with this interpreter and working folder; no secret is among them."""
    inherited = dict(settings.child_environment)
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    return {
        **inherited,
        "PATH": os.pathsep.join([str(python.parent), inherited.get("PATH", os.defpath)]),
        "HOME": str(folder),
        "TMPDIR": str(temporary),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONNOUSERSITE": "1",
    }


def how_it_ended(status: int) -> str:
    """Describe a process's exit status in words."""
    if status == -signal.SIGKILL:
        return "was killed (by hand, or the machine ran out of memory)"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _wait(process: subprocess.Popen[bytes], task: Task) -> None:
    while not task.stop.is_set():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_CHECK_SECONDS)
            return
    raise WorkerFailed(f"worker {task.script.stem} was stopped")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the worker's process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
