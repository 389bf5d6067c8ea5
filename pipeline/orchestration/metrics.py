"""What Prometheus is told of the pipeline and of the registry, as both are now: no history is kept here."""

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

# How many of the newest events of a stage or a gate are looked through for each release's last.
_NEWEST = 500


@dataclass(frozen=True)
class Metrics:
    """One look. ``runs`` counts releases by how they ended or stand; ``queue`` is what waits, of any kind."""

    champions: Sequence[Mapping[str, Any]]
    runs: Mapping[str, int]
    queue: int
    verdicts: Sequence[Mapping[str, str]]
    stages: Sequence[Mapping[str, Any]]
    store_bytes: Mapping[str, int]


def look(settings: Settings, instance: DagsterInstance) -> Metrics:
    """Look at everything once.

    Raises:
        TrackingError: the registry can't be read.
    """
    return Metrics(
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


def champions(settings: Settings) -> Sequence[Mapping[str, Any]]:
    """Every release line's champion: name, version, manifest digest, and whether a rescan has marked it."""
    return [
        {
            "release": version.name,
            "version": version.version,
            "manifest_digest": version.manifest_digest,
            "marked": TAG in version.tags and Mark.read(version.tags[TAG]).blocks,
        }
        for version in catalog.lines(settings.tracking_uri)
        if "champion" in version.aliases
    ]


def exposition(found: Metrics) -> str:
    """One look in Prometheus' text format."""
    registry = CollectorRegistry()

    def gauge(name: str, words: str, *labels: str) -> Gauge:
        return Gauge(f"slipway_{name}", words, labels, registry=registry)

    marked = gauge("release_marked", "1 where a rescan found in the champion what the policy forbids.", "release")
    info = gauge("release_info", "The champion of each release line.", "release", "version", "manifest")
    for each in found.champions:
        marked.labels(each["release"]).set(int(each["marked"]))
        info.labels(each["release"], each["version"], each["manifest_digest"]).set(1)
    runs = gauge("release_runs", "Runs of releases, by how they ended or stand.", "status")
    for status, count in found.runs.items():
        runs.labels(status).set(count)
    gauge("queued_runs", "Runs of any kind that wait.").set(found.queue)
    verdict = gauge("verdict_info", "Each gate's last verdict.", "release", "gate", "status")
    for judged in found.verdicts:
        verdict.labels(judged["release"], judged["gate"], judged["status"]).set(1)
    seconds = gauge("stage_seconds", "How long a stage took when its artifact was made last.", "release", "stage")
    for stage in found.stages:
        seconds.labels(stage["release"], stage["stage"]).set(stage["seconds"])
    size = gauge("artifact_store_bytes", "Bytes in a stage's artifacts; a release shares its checkpoint's.", "stage")
    for name, taken in found.store_bytes.items():
        size.labels(name).set(taken)
    return generate_latest(registry).decode()


def _verdicts(instance: DagsterInstance) -> Iterator[Mapping[str, str]]:
    """The last verdict of each gate on each release."""
    for key in (key for gate in checks.ALL for key in gate.check_keys):
        seen = set()
        for record in instance.event_log_storage.get_asset_check_execution_history(key, limit=_NEWEST):
            event = record.event.dagster_event if record.event else None
            if event is None or event.event_type != DagsterEventType.ASSET_CHECK_EVALUATION:
                continue  # planned, and not there yet
            release = _release(event.asset_check_evaluation_data.partition)
            if release not in seen:
                seen.add(release)
                told: Any = event.asset_check_evaluation_data.metadata[VERDICT].value
                yield {"release": release, "gate": told["name"], "status": told["status"]}


def _stages(instance: DagsterInstance) -> Iterator[Mapping[str, Any]]:
    """How long each stage of each release took when it was last made, and not taken from the store."""
    for stage in STAGES:
        seen = set()
        for record in instance.fetch_materializations(AssetRecordsFilter(AssetKey(stage.name)), limit=_NEWEST).records:
            made = record.asset_materialization
            release = _release(record.partition_key)
            if made is None or release in seen or made.metadata[CACHED].value:
                continue
            seen.add(release)
            yield {"release": release, "stage": stage.name, "seconds": made.metadata[SECONDS].value}


def _store_bytes(store: Store) -> Mapping[str, int]:
    folders = [folder for folder in sorted(store.root.glob("*")) if folder.is_dir() and not folder.name.startswith(".")]
    return {
        folder.name: sum(
            int(entry["size"]) for _, record in store.records(folder.name) for entry in record["files"].values()
        )
        for folder in folders
    }


def _release(partition: str | None) -> str:
    """`demo|awq` as the registry names it."""
    return (partition or "").replace("|", "-")
