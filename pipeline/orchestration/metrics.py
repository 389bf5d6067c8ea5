"""Metrics of the pipeline and the registry for Prometheus: their current state, without history."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dagster import (
    AssetKey,
    AssetRecordsFilter,
    DagsterEventType,
    DagsterInstance,
    DagsterRunStatus,
    RunsFilter,
)
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from pipeline.operations.rescan import TAG, Mark
from pipeline.orchestration import checks
from pipeline.orchestration.jobs import RELEASE_JOB
from pipeline.settings import Settings
from pipeline.stages.metadata import CACHED, SECONDS, VERDICT
from pipeline.stages.table import STAGES
from pipeline.store.artifacts import Store
from registry import catalog

# How many of the newest events of a stage or gate are searched for each release's latest.
_NEWEST = 500


@dataclass(frozen=True)
class ChampionState:
    """The champion of a release line; ``marked`` if a rescan found what its policy forbids."""

    release: str
    version: str
    manifest_digest: str | None
    marked: bool


@dataclass(frozen=True)
class LastVerdict:
    """The last verdict of a gate on a release."""

    release: str
    gate: str
    status: str


@dataclass(frozen=True)
class StageDuration:
    """How long it took, in seconds, when a release's artifact was last made."""

    release: str
    stage: str
    seconds: float


@dataclass(frozen=True)
class ReleaseMetrics:
    """The current state. ``runs`` counts runs of releases by status; ``queue`` counts waiting runs of any kind."""

    champions: Sequence[ChampionState]
    runs: Mapping[str, int]
    queue: int
    verdicts: Sequence[LastVerdict]
    stages: Sequence[StageDuration]
    store_bytes: Mapping[str, int]


def look(settings: Settings, instance: DagsterInstance) -> ReleaseMetrics:
    """Read the current state.

    Raises:
        TrackingError: the registry can't be read.
    """
    return ReleaseMetrics(
        champions=champions(settings),
        runs={
            status.value.lower(): instance.get_runs_count(RunsFilter(job_name=RELEASE_JOB, statuses=[status]))
            for status in DagsterRunStatus
            if status != DagsterRunStatus.MANAGED
        },
        queue=instance.get_runs_count(RunsFilter(statuses=[DagsterRunStatus.QUEUED])),
        verdicts=list(_verdicts(instance)),
        stages=list(_stages(instance)),
        store_bytes=_store_bytes(Store(settings.home / "artifacts")),
    )


def champions(settings: Settings) -> Sequence[ChampionState]:
    """The champion of each release line."""
    return [
        ChampionState(
            release=version.name,
            version=version.version,
            manifest_digest=version.manifest_digest,
            marked=TAG in version.tags and Mark.read(version.tags[TAG]).blocks,
        )
        for version in catalog.lines(settings.tracking_uri)
        if "champion" in version.aliases
    ]


def exposition(found: ReleaseMetrics) -> str:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry()

    def gauge(name: str, words: str, *labels: str) -> Gauge:
        return Gauge(f"slipway_{name}", words, labels, registry=registry)

    marked = gauge(
        "release_marked", "1 if a rescan found vulnerabilities in the champion that the policy forbids.", "release"
    )
    info = gauge("release_info", "The champion of each release line.", "release", "version", "manifest")
    for each in found.champions:
        marked.labels(each.release).set(int(each.marked))
        info.labels(each.release, each.version, each.manifest_digest).set(1)
    runs = gauge("release_runs", "Runs of releases, by status.", "status")
    for status, count in found.runs.items():
        runs.labels(status).set(count)
    gauge("queued_runs", "Waiting runs of any kind.").set(found.queue)
    verdict = gauge("verdict_info", "The last verdict of each gate.", "release", "gate", "status")
    for judged in found.verdicts:
        verdict.labels(judged.release, judged.gate, judged.status).set(1)
    seconds = gauge("stage_seconds", "Duration of a stage when its artifact was last made.", "release", "stage")
    for stage in found.stages:
        seconds.labels(stage.release, stage.stage).set(stage.seconds)
    size = gauge("artifact_store_bytes", "Bytes of a stage's artifacts; a release shares its checkpoint's.", "stage")
    for name, taken in found.store_bytes.items():
        size.labels(name).set(taken)
    return generate_latest(registry).decode()


def _verdicts(instance: DagsterInstance) -> Iterator[LastVerdict]:
    """The last verdict of each gate on each release."""
    for key in (key for gate in checks.ALL for key in gate.check_keys):
        seen = set()
        for record in instance.event_log_storage.get_asset_check_execution_history(key, limit=_NEWEST):
            event = record.event.dagster_event if record.event else None
            if event is None or event.event_type != DagsterEventType.ASSET_CHECK_EVALUATION:
                continue  # planned, but not evaluated yet
            release = _release(event.asset_check_evaluation_data.partition)
            if release not in seen:
                seen.add(release)
                found: Any = event.asset_check_evaluation_data.metadata[VERDICT].value
                yield LastVerdict(release, found["name"], found["status"])


def _stages(instance: DagsterInstance) -> Iterator[StageDuration]:
    """The duration of each stage of each release when its artifact was last made, not taken from the store."""
    for stage in STAGES:
        seen = set()
        for record in instance.fetch_materializations(AssetRecordsFilter(AssetKey(stage.name)), limit=_NEWEST).records:
            made = record.asset_materialization
            release = _release(record.partition_key)
            if made is None or release in seen or made.metadata[CACHED].value:
                continue
            seen.add(release)
            yield StageDuration(release, stage.name, float(str(made.metadata[SECONDS].value)))


def _store_bytes(store: Store) -> Mapping[str, int]:
    folders = [folder for folder in sorted(store.root.glob("*")) if folder.is_dir() and not folder.name.startswith(".")]
    return {
        folder.name: sum(file.size for _, record in store.records(folder.name) for file in record.files.values())
        for folder in folders
    }


def _release(partition: str | None) -> str:
    """The release line of a partition: `demo-awq` for `demo|awq`."""
    return (partition or "").replace("|", "-")
