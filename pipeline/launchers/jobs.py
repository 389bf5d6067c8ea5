"""Workers as jobs of an engine that others run: sent by digest, submitted, followed, stopped, and fetched by digest.

A job is named after its errand and what does it: whoever asks for the same while it runs, because the process that
started it was killed, follows that very job.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Protocol

from pipeline.environments import Progress
from pipeline.errors import WorkerFailed
from pipeline.launchers.errand import message, outcome_in, receive, send
from pipeline.launchers.task import MESSAGES, Ended, Task
from registry.manifest import FileRecord
from registry.objects import ObjectStore

_POLL_SECONDS = 0.5
_LOG_LINES = 20


class Engine(Protocol):
    """What runs jobs."""

    @property
    def name(self) -> str:
        """What a person calls it, with its address."""
        ...

    @property
    def does(self) -> str:
        """What does errands there, by content: the code's digest, or an image."""
        ...

    def running(self, job: str) -> bool | None:
        """Whether a job waits or runs; False where it has ended, None where there never was one."""
        ...

    def log(self, job: str) -> str:
        """What a job has printed so far."""
        ...

    def why(self, job: str) -> str:
        """What the engine says of a job's end, or of why it has not begun."""
        ...

    def submit(self, job: str, errand: FileRecord, task: Task) -> None:
        """Start `pipeline.launchers.node` on an errand, under a name that no other job has."""
        ...

    def stop(self, job: str) -> None:
        """Stop a job; that it has ended, or the engine is gone, is as good."""
        ...


class Jobs:
    """Runs workers as jobs of an engine."""

    def __init__(self, engine: Engine, store: str, progress: Progress) -> None:
        """Speak to the engine only when there is something to run; ``store`` is s3://BUCKET/PREFIX."""
        self.engine = engine
        self.store = store
        self.progress = progress

    def __call__(self, task: Task) -> Ended:
        """Send the errand, follow its job to the end, and fetch what came of it.

        Raises:
            UnansweredError: the engine does not answer.
            WorkerFailed: the engine refuses, or the job ended without an outcome.
            TrackingError: the object store refuses, or holds something else than its names say.
        """
        store = ObjectStore.opened(self.store)
        errand = send(task, store)
        stem = hashlib.sha256(f"{errand.sha256} {self.engine.does}".encode()).hexdigest()[:32]
        job, running = self._next(f"slipway-{stem}")
        try:
            if not running:
                self.engine.submit(job, errand, task)
            self.progress(f"{self.engine.name} {'runs it already' if running else 'is given it'}, as {job}")
            outcome = self._follow(job, task)
        except BaseException:
            self.engine.stop(job)
            raise
        return receive(outcome, task, store)

    def _next(self, stem: str) -> tuple[str, bool]:
        """The job of this stem that runs, or else the first name that no job has had, and whether it runs."""
        for number in itertools.count(1):
            job = f"{stem}-{number}"
            running = self.engine.running(job)
            if running is not False:
                break
        return job, bool(running)

    def _follow(self, job: str, task: Task) -> FileRecord:
        """Hand on what the job reports until it has ended, and return where its outcome is."""
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
        if outcome is None:
            told = "\n".join([*other[-_LOG_LINES:], self.engine.why(job)])
            raise WorkerFailed(f"the job {job} of {self.engine.name} ended without an outcome:\n{told}")
        return outcome

    def _lines(self, job: str, task: Task) -> Iterator[str]:
        """Every line of a job's log as it comes, until the job has ended."""
        seen, ended = 0, False
        while not ended:
            # Asked before the log is read, so that what was written last is read too.
            ended = not self.engine.running(job)
            log = self.engine.log(job)
            whole = len(log) if ended else log.rfind("\n") + 1
            yield from log[seen:whole].splitlines()
            seen = max(seen, whole)
            if not ended and task.stop.wait(_POLL_SECONDS):
                raise WorkerFailed(f"the job {job} of {self.engine.name} was stopped")
