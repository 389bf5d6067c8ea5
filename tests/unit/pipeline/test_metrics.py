"""What Prometheus is told, from a real instance's events and a real store."""

from __future__ import annotations

from pathlib import Path

import pytest
from dagster import (
    AssetCheckEvaluation,
    AssetKey,
    AssetMaterialization,
    DagsterInstance,
    MetadataValue,
    MultiPartitionKey,
)

from pipeline.operations.rescan import Mark
from pipeline.orchestration.metrics import LastVerdict, StageDuration, exposition, look
from pipeline.stages.metadata import CACHED, SECONDS, VERDICT
from unit.pipeline.filled import Models

KEY = MultiPartitionKey({"model": "demo", "scheme": "gptq"})


def made(instance: DagsterInstance, stage: str, seconds: float, *, cached: bool) -> None:
    metadata = {SECONDS: seconds, CACHED: cached}
    instance.report_runless_asset_event(AssetMaterialization(stage, partition=KEY, metadata=metadata))


def judged(instance: DagsterInstance, status: str) -> None:
    told = MetadataValue.json({"name": "drift", "status": status})
    instance.report_runless_asset_event(
        AssetCheckEvaluation(
            AssetKey("drift"), "drift_gate", passed=status == "pass", metadata={VERDICT: told}, partition=str(KEY)
        )
    )


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def test_it_tells_each_gates_last_verdict_and_how_long_a_stage_took_when_it_was_last_made(models: Models) -> None:
    with DagsterInstance.ephemeral() as instance:
        judged(instance, "fail")
        made(instance, "quantized", 31.5, cached=False)
        made(instance, "quantized", 0.1, cached=True)
        found = look(models.settings, instance)
    assert found.verdicts == [LastVerdict("demo-gptq", "drift", "fail")]
    assert found.stages == [StageDuration("demo-gptq", "quantized", 31.5)]
    assert (found.queue, set(found.runs.values()), found.champions) == (0, {0}, [])


def test_it_tells_what_the_store_holds_by_stage(models: Models) -> None:
    models.release(models.write())
    with DagsterInstance.ephemeral() as instance:
        found = look(models.settings, instance)
    weights = sum(path.stat().st_size for path in (models.settings.models / "demo" / "model").iterdir())
    assert found.store_bytes["source"] == weights
    assert 'slipway_artifact_store_bytes{stage="source"}' in exposition(found)


@pytest.mark.parametrize(
    ("tag", "marked"),
    [('{"blocks": false}', False), ('{"blocks": true}', True), ("{", True), ("[]", True), ("[" * 4000, True)],
)
def test_a_mark_that_cannot_be_read_is_no_reason_to_be_quiet(tag: str, marked: bool) -> None:
    assert Mark.read(tag).blocks == marked
