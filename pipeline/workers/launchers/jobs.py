"""Runs workers as jobs of a Ray or Kubernetes cluster: sends files, submits a job, follows it, fetches its outcome.

A job's name is derived from its `RemoteJob` and from the code or image that runs it. So a process that asks for the
same work while the job runs, because the process that started it was killed, follows that job.

A job continues while its cluster's API is unavailable: a server that restarts does not answer, and may then refuse for
some seconds (Kubernetes answers 403 until it has read its roles). So requests are retried for minutes. A job is ended
only if the run that started it is stopped. If another run started the job, that run may stop it; this run then starts
the job again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

from pipeline.errors import UnansweredError, WorkerFailed
from pipeline.workers.launchers.remote_job import is_message, outcome_in, receive, send
from pipeline.workers.launchers.task import MESSAGES, Ended, Task
from registry.manifest import FileRecord
from registry.objects import ObjectStore
from registry.progress import Progress

# How long requests about a known job are retried while its cluster refuses or does not answer, beyond `http`'s retries.
_PATIENCE_SECONDS = 600.0
# The same for the log of a job that has ended, whose node may be gone.
_LAST_LOG_SECONDS = 60.0
_PAUSE_SECONDS = 1.0
_LOG_LINES = 20
_STATES = 5
T = TypeVar("T")


class Log(NamedTuple):
    """A job's output so far, and which of its attempts wrote it: a cluster may start a job again on another node."""

    attempt: str
    text: str


NO_LOG = Log("", "")


class Engine(Protocol):
    """A cluster that runs jobs."""

    @property
    def name(self) -> str:
        """Its name for messages, with its address."""
        ...

    @property
    def code(self) -> str:
        """The digest of the code or image that runs remote jobs there."""
        ...

    @property
    def poll_seconds(self) -> float:
        """Seconds between two requests for a job's state."""
        ...

    def running(self, job: str) -> bool | None:
        """Whether a job waits or runs; False if it has ended, None if it does not exist."""
        ...

    def was_stopped(self, job: str) -> bool:
        """Whether a job that no longer runs was stopped or deleted, rather than ended by itself."""
        ...

    def states(self, job: str) -> Sequence[str]:
        """Why a job does not run, and its events, one line each, as the cluster states them."""
        ...

    def log(self, job: str) -> Log:
        """The output of the job's newest attempt; `NO_LOG` if there is none yet."""
        ...

    def why(self, job: str) -> str:
        """The cluster's explanation of why a job ended or did not begin."""
        ...

    def submit(self, job: str, remote_job: FileRecord, task: Task) -> None:
        """Start `pipeline.workers.launchers.node` for a remote job, under a name that no other job has."""
        ...

    def stop(self, job: str) -> None:
        """Stop a job; errors are ignored, because it may have ended already."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


class Jobs:
    """The launcher that runs workers as jobs of a cluster."""

    def __init__(self, engine: Engine, store: str, progress: Progress) -> None:
        """Keep the settings; the cluster is contacted when a worker starts. ``store`` is s3://BUCKET/PREFIX."""
        self.engine = engine
        self.store = store
        self.progress = progress
        self._states: list[str] = []

    def __call__(self, task: Task) -> Ended:
        """Send the remote job, follow its job to the end, and fetch its outcome.

        Raises:
            UnansweredError: the cluster does not answer.
            WorkerFailed: the cluster refuses, or the job ended without an outcome.
            TrackingError: the object store refuses, or a file in it does not match its digest.
        """
        store = ObjectStore.opened(self.store)
        remote_job = send(task, store)
        stem = hashlib.sha256(f"{remote_job.sha256} {self.engine.code}".encode()).hexdigest()[:32]
        outcome = None
        with contextlib.closing(self.engine):
            while outcome is None:
                outcome = self._tried(f"slipway-{stem}", remote_job, task)
        return receive(outcome, task, store)

    def _tried(self, stem: str, remote_job: FileRecord, task: Task) -> FileRecord | None:
        """Start a job, or follow the one that runs already; None if another run stopped it meanwhile."""
        job, running = self._next(stem)
        try:
            if not running:
                self.engine.submit(job, remote_job, task)
            self.progress(f"{self.engine.name}: {'following the running job' if running else 'submitted as'} {job}")
            return self._follow(job, task, joined=bool(running))
        except Exception as error:  # whatever failed, the job may still be running
            if task.stop.is_set() and not running:
                self.engine.stop(job)
            elif task.stop.is_set():
                self.progress(f"job {job} was started by another run, and continues")
            elif isinstance(error, UnansweredError):
                self.progress(f"job {job} may still run: the next run will follow it")
            raise
        except BaseException:  # also an interruption by a person or by Dagster
            if not running:
                self.engine.stop(job)
            raise

    def _next(self, stem: str) -> tuple[str, bool]:
        """The running job with this stem, else the first unused name; and whether it runs."""
        for number in itertools.count(1):
            job = f"{stem}-{number}"
            running = self.engine.running(job)
            if running is not False:
                break
        return job, bool(running)

    def _follow(self, job: str, task: Task, *, joined: bool) -> FileRecord | None:
        """Pass on the job's messages until it has ended, and return the record of its outcome.

        None if another run stopped a job that this run had ``joined``.
        """
        outcome, other = None, []
        with (task.folder / MESSAGES).open("a") as messages:
            for line in self._lines(job, task):
                if not is_message(line):
                    other.append(line)
                    continue
                outcome = outcome_in(line) or outcome
                messages.write(line + "\n")
                messages.flush()
        if outcome is None and joined and self._asked(lambda: self.engine.was_stopped(job), task, _PATIENCE_SECONDS):
            self.progress(f"job {job} was stopped by the run that started it: starting it again")
            return None
        if outcome is None:
            why = self._asked(lambda: self.engine.why(job), task, _PATIENCE_SECONDS)
            tail = "\n".join(dict.fromkeys([*other[-_LOG_LINES:], *self._states[-_STATES:], why]))
            raise WorkerFailed(f"job {job} of {self.engine.name} ended without an outcome:\n{tail}")
        return outcome

    def _lines(self, job: str, task: Task) -> Iterator[str]:
        """Yield the lines of a job's log as they arrive, until the job has ended; all of those of a new attempt."""
        attempt, seen, ended = "", 0, False
        self._states = []
        while not ended:
            # Checked before the log is read, so that the last lines are read too.
            ended = not self._asked(lambda: self.engine.running(job), task, _PATIENCE_SECONDS)
            self._report_states(job, task)
            log = self._log(job, task, ended=ended)
            if log.attempt != attempt and log != NO_LOG:
                if attempt:
                    self.progress(f"{job}: the cluster ended it and started it again, as {log.attempt}")
                attempt, seen = log.attempt, 0
            whole = len(log.text) if ended else log.text.rfind("\n") + 1
            yield from log.text[seen:whole].splitlines()
            seen = max(seen, whole)
            if not ended and task.stop.wait(self.engine.poll_seconds):
                raise WorkerFailed(f"job {job} of {self.engine.name} was stopped")

    def _report_states(self, job: str, task: Task) -> None:
        """Report each new state once: a cluster knows within seconds why a job does not begin."""
        for state in self._asked(lambda: self.engine.states(job), task, _PATIENCE_SECONDS):
            if state not in self._states:
                self._states.append(state)
                self.progress(f"{job}: {state}")

    def _log(self, job: str, task: Task, *, ended: bool) -> Log:
        """A job's log; empty if it can't be read now. The log of a job that has ended is retried for a while.

        Its node may be gone, and the job with it; the caller checks the job's state next.
        """
        try:
            return self._asked(lambda: self.engine.log(job), task, _LAST_LOG_SECONDS) if ended else self.engine.log(job)
        except WorkerFailed as error:
            problem = f"its log can't be read: {error}"
            if problem not in self._states:
                self._states.append(problem)
                self.progress(f"{job}: {problem}")
            return NO_LOG

    def _asked(self, ask: Callable[[], T], task: Task, patience: float) -> T:
        """Call ``ask`` about a known job; retry for ``patience`` seconds if the cluster refuses or does not answer."""
        deadline, said = time.monotonic() + patience, ""
        while True:
            try:
                return ask()
            except WorkerFailed as error:
                if time.monotonic() >= deadline:
                    raise
                if said != str(error):
                    said = str(error)
                    self.progress(f"retrying for {patience / 60:.0f} minutes, while the job continues: {said}")
            if task.stop.wait(_PAUSE_SECONDS):
                raise WorkerFailed(f"a job of {self.engine.name} was stopped")
