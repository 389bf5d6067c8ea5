"""A release that a run would leave exactly as it is, told as its run would tell it, and without one.

Dagster takes longer to be loaded than all the looks that say that nothing is to be done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from pipeline import promotion
from pipeline.expected import EXPECTED
from pipeline.handles import Handles
from pipeline.metadata import CACHED, SECONDS, WORKER_SECONDS, judged
from pipeline.release import Event
from pipeline.settings import Settings
from pipeline.spec import ModelSpec
from pipeline.standing import was_taken_back
from pipeline.store import Artifact
from pipeline.walk import ShelfBench, walk


def unchanged(spec: ModelSpec, scheme: str, settings: Settings) -> list[Event] | None:
    """Return what a run of the release would tell (as `pipeline.events`), or None where it would do anything.

    It would do nothing where every artifact is made, as of today's vulnerability database; where the engine still has
    the image; where no gate refuses; where the registry's aliases are as the model's file wants them and the audit
    trail has them; and where the last run that began went through all of that, so that Dagster shows no other. What
    can't be looked at is no reason to stop: the run comes to it, and says where.
    """
    said: list[str] = []
    bench = ShelfBench(spec, scheme, settings, said.append)
    events: list[Event] = []
    made: dict[str, Artifact] = {}
    since = time.monotonic()
    try:
        for name, found in walk(bench):
            if isinstance(found, Artifact):
                made[name] = found
                events += [*_progress(name, said), _done(name, time.monotonic() - since)]
            else:
                events.append({"event": "gate", **judged(name, found)})
            since = time.monotonic()
        release = made.get("release")
        if release is None or not _was_the_last(settings, bench, made):
            return None
        released = promotion.settled(bench, release, candidate_only=was_taken_back(bench, release))
    except EXPECTED:
        return None
    if released is None:
        return None
    ending = {"event": "end", "outcome": released["outcome"], "release": released, "error": None}
    return [*events, *_progress("release", said), ending]


def _was_the_last(settings: Settings, bench: ShelfBench, made: Mapping[str, Artifact]) -> bool:
    """Whether the run of this release that began last made, or found, all of this: its last stage is the newest."""
    handles, partition = Handles(settings), f"{bench.spec.model}|{bench.scheme_name}"
    if any(handles.read(name, partition) != (found.stage, found.key) for name, found in made.items()):
        return False
    written = [handles.path(name, partition).stat().st_mtime_ns for name in made]
    return written[-1] == max(written)


def _progress(stage: str, said: list[str]) -> Iterator[Event]:
    while said:
        yield {"event": "progress", "stage": stage, "text": said.pop(0)}


def _done(stage: str, seconds: float) -> Event:
    return {"event": "stage", "name": stage, SECONDS: round(seconds, 3), CACHED: True, WORKER_SECONDS: 0.0}
