"""Workers as jobs of an engine that others run: sent by digest, submitted, followed, stopped, and fetched by digest.

A job's name is derived from its `RemoteJob` and from the code or image that runs it. So a process that asks for the
same work while the job runs, because the process that started it was killed, follows that job.

A job that was seen outlives what happens to its engine's interface: a server that restarts answers nothing, and then
for some seconds that one may not (Kubernetes' 403 until its roles are read). So it is asked again for minutes, and a
job is ended only where the run that started it is stopped. One that another run started is left to that run; one that
the run which started it stopped is started again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from pipeline.errors import UnansweredError, WorkerFailed
from pipeline.workers.launchers.remote_job import message, outcome_in, receive, send
from pipeline.workers.launchers.task import MESSAGES, Ended, Task
from registry.manifest import FileRecord
from registry.objects import ObjectStore
from registry.progress import Progress

# How long a job that was seen is asked after while its engine refuses or does not answer, beside `http`'s own patience.
_PATIENCE_SECONDS = 600.0
# The same for the log of a job that has ended: its node may be gone.
_LAST_LOG_SECONDS = 60.0
_PAUSE_SECONDS = 1.0
_LOG_LINES = 20
_STATES = 5
Told = TypeVar("Told")


class Engine(Protocol):
    """What runs jobs."""

    @property
    def name(self) -> str:
        """What a person calls it, with its address."""
        ...

    @property
    def does(self) -> str:
        """What runs remote jobs there, by content: the code's digest, or an image."""
        ...

    @property
    def poll_seconds(self) -> float:
        """How long to leave it alone between two looks at a job."""
        ...

    def running(self, job: str) -> bool | None:
        """Whether a job waits or runs; False where it has ended, None where there is none."""
        ...

    def was_stopped(self, job: str) -> bool:
        """Whether a job that does not run any more was stopped or deleted, rather than ended by itself."""
        ...

    def states(self, job: str) -> Sequence[str]:
        """What keeps a job from running, or was done to it, one line each, in the engine's own words."""
        ...

    def log(self, job: str) -> str:
        """What a job has printed so far."""
        ...

    def why(self, job: str) -> str:
        """What the engine says of a job's end, or of why it has not begun."""
        ...

    def submit(self, job: str, remote_job: FileRecord, task: Task) -> None:
        """Start `pipeline.workers.launchers.node` for a remote job, under a name that no other job has."""
        ...

    def stop(self, job: str) -> None:
        """Stop a job; that it has ended, or the engine is gone, is as good."""
        ...

    def close(self) -> None:
        """Give back what was kept to speak to it."""
        ...


class Jobs:
    """Runs workers as jobs of an engine."""

    def __init__(self, engine: Engine, store: str, progress: Progress) -> None:
        """Speak to the engine only when there is something to run; ``store`` is s3://BUCKET/PREFIX."""
        self.engine = engine
        self.store = store
        self.progress = progress
        self._states: list[str] = []

    def __call__(self, task: Task) -> Ended:
        """Send the remote job, follow its job to the end, and fetch its outcome.

        Raises:
            UnansweredError: the engine does not answer.
            WorkerFailed: the engine refuses, or the job ended without an outcome.
            TrackingError: the object store refuses, or holds something else than its names say.
        """
        store = ObjectStore.opened(self.store)
        remote_job = send(task, store)
        stem = hashlib.sha256(f"{remote_job.sha256} {self.engine.does}".encode()).hexdigest()[:32]
        outcome = None
        with contextlib.closing(self.engine):
            while outcome is None:
                outcome = self._tried(f"slipway-{stem}", remote_job, task)
        return receive(outcome, task, store)

    def _tried(self, stem: str, remote_job: FileRecord, task: Task) -> FileRecord | None:
        """Start a job, or join the one that runs, and follow it; None where another run took it away meanwhile."""
        job, running = self._next(stem)
        try:
            if not running:
                self.engine.submit(job, remote_job, task)
            self.progress(f"{self.engine.name} {'runs it already' if running else 'is given it'}, as {job}")
            return self._follow(job, task, joined=bool(running))
        except Exception as error:  # whatever failed, the job may still be running
            if task.stop.is_set() and not running:
                self.engine.stop(job)
            elif task.stop.is_set():
                self.progress(f"the job {job} was started by another run: it is left to that one")
            elif isinstance(error, UnansweredError):
                self.progress(f"the job {job} may run on: the next run follows it")
            raise
        except BaseException:  # an interruption, by a person or by Dagster
            if not running:
                self.engine.stop(job)
            raise

    def _next(self, stem: str) -> tuple[str, bool]:
        """The job of this stem that runs, or else the first name that no job has had, and whether it runs."""
        for number in itertools.count(1):
            job = f"{stem}-{number}"
            running = self.engine.running(job)
            if running is not False:
                break
        return job, bool(running)

    def _follow(self, job: str, task: Task, *, joined: bool) -> FileRecord | None:
        """Hand on what the job reports until it has ended, and return where its outcome is.

        None where it was stopped although nobody here did: who ``joined`` it may start it again.
        """
        outcome, other = None, []
        with (task.folder / MESSAGES).open("a") as messages:
            for line in self._lines(job, task):
                said = message(line)
                if said is None:
                    other.append(line)
                    continue
                outcome = outcome_in((said.get("params") or {}).get("payload")) or outcome
                messages.write(line + "\n")
                messages.flush()
        if outcome is None and joined and self._asked(lambda: self.engine.was_stopped(job), task, _PATIENCE_SECONDS):
            self.progress(f"the job {job} was stopped by the run that started it: starting it again")
            return None
        if outcome is None:
            why = self._asked(lambda: self.engine.why(job), task, _PATIENCE_SECONDS)
            told = "\n".join(dict.fromkeys([*other[-_LOG_LINES:], *self._states[-_STATES:], why]))
            raise WorkerFailed(f"the job {job} of {self.engine.name} ended without an outcome:\n{told}")
        return outcome

    def _lines(self, job: str, task: Task) -> Iterator[str]:
        """Every line of a job's log as it comes, until the job has ended."""
        seen, ended = 0, False
        self._states = []
        while not ended:
            # Asked before the log is read, so that what was written last is read too.
            ended = not self._asked(lambda: self.engine.running(job), task, _PATIENCE_SECONDS)
            self._tell_states(job, task)
            log = self._log(job, task, ended=ended)
            whole = len(log) if ended else log.rfind("\n") + 1
            yield from log[seen:whole].splitlines()
            seen = max(seen, whole)
            if not ended and task.stop.wait(self.engine.poll_seconds):
                raise WorkerFailed(f"the job {job} of {self.engine.name} was stopped")

    def _tell_states(self, job: str, task: Task) -> None:
        """Say each change once: why a job does not begin is known to its engine within seconds."""
        for state in self._asked(lambda: self.engine.states(job), task, _PATIENCE_SECONDS):
            if state not in self._states:
                self._states.append(state)
                self.progress(f"{job}: {state}")

    def _log(self, job: str, task: Task, *, ended: bool) -> str:
        """A job's log; nothing where it can't be read now, or, of one that has ended, for a while.

        Its node may be gone, and the job with it: what became of that is asked next.
        """
        try:
            return self._asked(lambda: self.engine.log(job), task, _LAST_LOG_SECONDS) if ended else self.engine.log(job)
        except WorkerFailed as error:
            told = f"its log can't be read: {error}"
            if told not in self._states:
                self._states.append(told)
                self.progress(f"{job}: {told}")
            return ""

    def _asked(self, ask: Callable[[], Told], task: Task, patience: float) -> Told:
        """Ask after a job that was seen; where the engine refuses or is silent, again for ``patience`` seconds."""
        deadline, said = time.monotonic() + patience, ""
        while True:
            try:
                return ask()
            except WorkerFailed as error:
                if time.monotonic() >= deadline:
                    raise
                if said != str(error):
                    said = str(error)
                    self.progress(f"asked again for {patience / 60:.0f} minutes, the job runs on: {said}")
            if task.stop.wait(_PAUSE_SECONDS):
                raise WorkerFailed(f"a job of {self.engine.name} was stopped")
