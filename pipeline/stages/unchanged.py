"""A release that a run would leave exactly as it is, told as its run would tell it, and without one.

Dagster takes longer to be loaded than all the looks that say that nothing is to be done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from pipeline.orchestration.release import Event
from pipeline.settings import Settings
from pipeline.sources.lock import read_lock
from pipeline.spec import ModelSpec
from pipeline.stages import promotion
from pipeline.stages.metadata import CACHED, SECONDS, WORKER_SECONDS, judged
from pipeline.stages.read_only import ReadOnlyContext
from pipeline.stages.standing import stays_taken_back
from pipeline.stages.walk import walk
from pipeline.store.artifacts import Artifact
from pipeline.store.materializations import MaterializationIndex


def unchanged(spec: ModelSpec, scheme: str, settings: Settings) -> list[Event] | None:
    """Return what a run would tell (as `pipeline.orchestration.events`), or None where it would do anything.

    It would do nothing where every artifact is made, as of today's vulnerability database; where the engine still has
    the image; where no gate refuses; where the registry's aliases are as the model's file wants them and the audit
    trail has them; and where the last run got to the end of all that, so that Dagster shows no other. What can't be
    looked at is no reason to stop: the run comes to it, and says where.
    """
    said: list[str] = []
    bench = ReadOnlyContext(spec, scheme, settings, said.append)
    events: list[Event] = []
    made: dict[str, Artifact] = {}
    since = time.monotonic()
    try:
        if read_lock(spec.lock) is None:
            return None  # never released: the look at its source would write one
        for name, found in walk(bench):
            if isinstance(found, Artifact):
                made[name] = found
                events += [*_progress(name, said), _done(name, time.monotonic() - since)]
            else:
                events.append({"event": "gate", **judged(found)})
            since = time.monotonic()
        release = made.get("release")
        places = {name: (artifact.stage, artifact.key) for name, artifact in made.items()}
        if release is None or not MaterializationIndex(settings).went_through(f"{spec.model}|{scheme}", places):
            return None
        released = promotion.settled(bench, release, candidate_only=stays_taken_back(bench, release))
    except Exception:  # noqa: BLE001 - whatever it is, the run meets it in its stage, where it fails one scheme alone
        return None
    if released is None:
        return None
    ending = {"event": "end", "outcome": released["outcome"], "release": released, "error": None}
    return [*events, *_progress("release", said), ending]


def _progress(stage: str, said: list[str]) -> Iterator[Event]:
    while said:
        yield {"event": "progress", "stage": stage, "text": said.pop(0)}


def _done(stage: str, seconds: float) -> Event:
    return {"event": "stage", "name": stage, SECONDS: round(seconds, 3), CACHED: True, WORKER_SECONDS: 0.0}
