"""Releasing a model from the command line: one process a scheme, their events shown, their endings gathered."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from containers.engine.engine import connect
from containers.errors import EngineError
from containers.sandbox import sandbox
from pipeline.orchestration.release_events import (
    RUN_EVENT,
    GateJudged,
    GateSummary,
    RunEnded,
    RunEvent,
    SchemeResult,
    StageDone,
    StageTiming,
)
from pipeline.settings import Settings
from pipeline.stages.metadata import figures
from pipeline.store.artifacts import Store
from pipeline.workers.launchers.local import how_it_ended

Show = Callable[[str, RunEvent], None]
Named = TypeVar("Named", StageDone, GateJudged)
# -P: the current folder may hold folders named as our packages are.
PROGRAM = (sys.executable, "-P", "-m", "pipeline.orchestration.run")
GO = "go"
_GRACE_SECONDS = 30.0


@dataclass
class _Run:
    """One scheme's process, and its events so far."""

    scheme: str
    process: subprocess.Popen[str]
    log: Path
    stages: list[StageDone] = field(default_factory=list)
    gates: list[GateJudged] = field(default_factory=list)
    ending: RunEnded | None = None

    def follow(self, show: Show) -> None:
        """Read events until the process ends."""
        assert self.process.stdout is not None  # noqa: S101 - opened as a pipe below
        with self.process.stdout as lines:
            for line in lines:
                event = _event(line)
                if event is not None:
                    self.hear(event, show)
        self.process.wait()
        if self.ending is None:
            self.hear(RunEnded(outcome="failed", error=self._last_words()), show)
        elif not self.log.read_bytes():
            self.log.unlink()

    def hear(self, event: RunEvent, show: Show) -> None:
        """Record an event, and show it."""
        match event:
            case StageDone():
                self.stages.append(event)
            case GateJudged():
                self.gates.append(event)
            case RunEnded():
                self.ending = event
        show(self.scheme, event)

    def call_off(self) -> None:
        """End the process, which has not done anything yet."""
        with self.process:
            self.process.kill()
        self.log.unlink()

    def result(self) -> SchemeResult:
        """The scheme's part of `slipway release --json`."""
        ending = self.ending or RunEnded(outcome="failed", error="it was not followed to its end")
        released = ending.release
        return SchemeResult(
            scheme=self.scheme,
            outcome=ending.outcome,
            version=released.version if released else None,
            aliases=released.aliases if released else (),
            manifest_digest=released.manifest_digest if released else None,
            image=released.image if released else None,
            stages=tuple(
                StageTiming(
                    name=each.name, seconds=each.seconds, cached=each.cached, worker_seconds=each.worker_seconds
                )
                for each in _in_stage_order(self.stages)
            ),
            gates=tuple(
                GateSummary(name=gate.name, status=gate.status, reason=gate.reason, blocks=gate.blocks)
                for gate in _in_stage_order(self.gates)
            ),
            measured=(released.measured if released else None) or self._measured(),
            variants=released.variants if released else {},
            weights=released.weights if released else {},
            error=ending.error,
        )

    def _measured(self) -> dict[str, float]:
        """The figures of a release that did not finish, from the events of its stages and gates."""
        metrics = {name: value for gate in self.gates for name, value in gate.metrics.items()}
        sizes = {stage.name: stage.size_bytes for stage in self.stages}
        return figures(metrics, sizes.get("source", 0), sizes.get("quantized", 0))

    def _last_words(self) -> str:
        tail = self.log.read_text(errors="replace").strip().splitlines()[-5:]
        return "\n".join([f"the run {how_it_ended(self.process.returncode)} (log: {self.log})", *tail])


def release(
    model_file: Path,
    schemes: Sequence[str],
    settings: Settings,
    show: Show,
    program: Sequence[str] = PROGRAM,
    meanwhile: Callable[[], Mapping[str, Sequence[RunEvent]]] = dict,
) -> list[SchemeResult]:
    """Run the schemes side by side and return their results, in the order given.

    ``show(scheme, event)`` is called from several threads as events arrive. On Ctrl-C every run is asked to stop, which
    ends its worker and removes its container; one that does not stop within 30 s is killed. ``program`` runs a scheme:
    it gets the model's file and the scheme, waits for the line ``go``, and prints events
    (`pipeline.orchestration.run`). Programs load while ``meanwhile`` is called, which returns the events of schemes
    that need no run. Where it raises, no run begins.
    """
    logs = settings.home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    stamp = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{model_file.stem}"
    runs: list[_Run] = []
    try:
        for scheme in schemes:
            log = logs / f"{stamp}-{scheme}.log"
            runs.append(_start([*program, str(model_file), scheme], scheme, log))
        unchanged = _until_ready(runs, meanwhile)
        for run in runs:
            for event in unchanged.get(run.scheme, ()):
                run.hear(event, show)
        begun = [run for run in runs if run.scheme not in unchanged]
        readers = [threading.Thread(target=run.follow, args=(show,), daemon=True) for run in begun]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    except BaseException:  # Ctrl-C among them: no run goes on without this process
        _stop(runs)
        raise
    return [run.result() for run in runs]


def sweep(settings: Settings) -> None:
    """Remove what runs of this home that were killed left behind: half-made artifacts, containers."""
    Store(settings.home / "artifacts").sweep()
    try:
        client = connect(settings.docker_host, settings.home)
    except EngineError:
        return  # no engine, so no containers; the stage that needs one says so
    try:
        sandbox.sweep(client, settings.home)
    finally:
        client.close()


def _in_stage_order(events: Sequence[Named]) -> list[Named]:
    """Sort events of stages, or of their gates: independent stages end in any order, the document has one."""
    from pipeline.stages.table import BY_NAME  # noqa: PLC0415 - takes a second to import, while the runs start

    order = list(BY_NAME)
    return sorted(events, key=lambda event: order.index(event.name) if event.name in order else len(order))


def _event(line: str) -> RunEvent | None:
    """Parse one line of a run's stdout; None where it is no event, for a library may print there too."""
    try:
        return RUN_EVENT.validate_json(line)
    except ValidationError:
        return None


def _start(command: Sequence[str], scheme: str, log: Path) -> _Run:
    with log.open("w") as stderr:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            # Apart from the terminal, so that Ctrl-C reaches it once, from here.
            process_group=0,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
    return _Run(scheme, process, log)


def _until_ready(
    runs: Sequence[_Run], meanwhile: Callable[[], Mapping[str, Sequence[RunEvent]]]
) -> Mapping[str, Sequence[RunEvent]]:
    """Call ``meanwhile``, let the runs begin that are needed, and return the events of the others."""
    try:
        unchanged = meanwhile()
    except BaseException:  # Ctrl-C among them: processes that were started must not wait for ever
        for run in runs:
            run.call_off()
        raise
    for run in runs:
        if run.scheme in unchanged:
            run.call_off()
            continue
        assert run.process.stdin is not None  # noqa: S101 - opened as a pipe above
        with (
            contextlib.suppress(BrokenPipeError),
            run.process.stdin as line,
        ):  # `follow` reports an ended one
            line.write(f"{GO}\n")
    return unchanged


def _stop(runs: Sequence[_Run]) -> None:
    for run in runs:
        with contextlib.suppress(ProcessLookupError):
            run.process.send_signal(signal.SIGINT)
    for run in runs:
        try:
            run.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            run.process.kill()
            run.process.wait()
