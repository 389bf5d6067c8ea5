"""How a release that is made stands in its line: what the line's trail says of it, whatever its aliases say now."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.stages.table import StageContext
from pipeline.store.artifacts import Artifact
from registry import catalog, journal
from registry.resolve import CANDIDATE, CHAMPION


def manifest_digest(release: Artifact) -> str:
    """What a release is known by in the registry."""
    return f"sha256:{release.files['release/manifest.json']['sha256']}"


def acts(bench: StageContext) -> Sequence[journal.Record]:
    """Who moved the aliases of the bench's line, in order; none where there is no line yet.

    Raises:
        TrackingError: the registry can't be read.
    """
    line = catalog.line(bench.settings.tracking_uri, bench.release_name)
    return [] if line is None else journal.records(line)


def stays_taken_back(bench: StageContext, release: Artifact) -> bool:
    """Say whether this very release was champion, and somebody made another the champion by hand since.

    It is still the candidate then, for nothing was released after it, and stays that, which is told: to run again what
    is made decides nothing.

    Raises:
        TrackingError: the registry can't be read.
    """
    versions = catalog.current(bench.settings.tracking_uri, bench.release_name)
    ours = next((version for version in versions if version.manifest_digest == manifest_digest(release)), None)
    if ours is None or CANDIDATE not in ours.aliases or CHAMPION in ours.aliases:
        return False
    moves = [move for record in acts(bench) if record.state == "done" for move in record.entry.moves]
    taken_back = any(move.alias == CHAMPION and move.after == ours.version for move in moves)
    if taken_back:
        bench.progress("it was champion and was taken back by hand, which stays: `slipway promote` appoints it anew")
    return taken_back
