"""A release that a run would leave exactly as it is, reported as its run would report it, and without one.

Loading Dagster takes longer than the whole dry run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from pipeline.orchestration.release_events import GateJudged, RunEnded, RunEvent, StageDone, StageProgress
from pipeline.settings import Settings
from pipeline.sources.lock import read_lock
from pipeline.spec import ModelSpec
from pipeline.stages.context import StageContext
from pipeline.stages.dry_run import DryRun, Missing
from pipeline.stages.metadata import judged
from pipeline.stages.promotion import already_promoted
from pipeline.store.artifacts import Artifact
from pipeline.store.materializations import MaterializationIndex
from registry.verdict import Verdict


def unchanged(spec: ModelSpec, scheme: str, settings: Settings) -> list[RunEvent] | None:
    """Return the events of a run (as `pipeline.orchestration.events`) that changes nothing; None where it would.

    It changes nothing where every artifact is there, of today's vulnerability database; where the engine still has the
    image, or its registry if it was pushed; where no gate blocks; where the aliases and the audit trail are as the
    model's file wants them; and where the last run came to its end with these artifacts, so that Dagster shows no
    others. An error is no reason to stop here: the run meets it in its stage, and says where.
    """
    lines: list[str] = []
    context = StageContext(spec, scheme, settings, lines.append)
    events: list[RunEvent] = []
    made: dict[str, Artifact] = {}
    since = time.monotonic()
    try:
        if read_lock(spec.lock) is None:
            return None  # never released: a run would write the lock
        for name, found in DryRun(context):
            if isinstance(found, Missing):
                return None
            if isinstance(found, Verdict):
                events.append(GateJudged(**judged(found).model_dump()))
            else:
                made[name] = found
                events += [*_progress(name, lines), _done(name, time.monotonic() - since)]
            since = time.monotonic()
        release = made.get("release")
        places = {name: (artifact.stage, artifact.key) for name, artifact in made.items()}
        if release is None or not MaterializationIndex(settings).went_through(f"{spec.model}|{scheme}", places):
            return None
        promoted = already_promoted(context, release)
    except Exception:  # noqa: BLE001 - whatever it is, the run meets it in its stage, where it fails one scheme alone
        return None
    if promoted is None:
        return None
    end = RunEnded(outcome=promoted.version.outcome, release=promoted.version)
    return [*events, *_progress("release", lines), end]


def _progress(stage: str, lines: list[str]) -> Iterator[RunEvent]:
    while lines:
        yield StageProgress(stage=stage, text=lines.pop(0))


def _done(stage: str, seconds: float) -> StageDone:
    return StageDone(name=stage, seconds=round(seconds, 3), cached=True, worker_seconds=0.0)
