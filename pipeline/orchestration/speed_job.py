"""A champion's load test in Dagster, from the UI or by a schedule: no part of a release, and no check of one.

A check would run with every materialization that the UI launches. What it measures is written beside the release, so
that its plots go on; a champion that has become slow fails the run, which sends a notification.
"""

from typing import Any

from dagster import (
    AssetObservation,
    Failure,
    MetadataValue,
    MultiPartitionKey,
    OpExecutionContext,
    ResourceParam,
    in_process_executor,
    job,
    op,
)

from pipeline.expected_errors import EXPECTED
from pipeline.operations.speed import look_again
from pipeline.orchestration.assets import GPU
from pipeline.orchestration.partitions import RELEASES, spec_of
from pipeline.orchestration.retries import fail
from pipeline.settings import Settings
from pipeline.stages.context import StageContext

SPEED_JOB = "load_champion"


@op(pool=GPU)
def speed(context: OpExecutionContext, settings: ResourceParam[Settings]) -> None:
    """Does the champion still hold its service level, and is it as fast as it was when it was released?"""
    try:
        spec, scheme = spec_of(context, settings)
        found = look_again(StageContext(spec, scheme, settings, context.log.info))
    except EXPECTED as error:
        fail(context, error)
    figures = {**{f"slower {name}": share for name, share in found.slower.items()}, **found.loaded.verdict.metrics}
    metadata: dict[str, Any] = {"speed": found.words, "page": MetadataValue.path(found.loaded.page), **figures}
    key = MultiPartitionKey({"model": spec.model, "scheme": scheme})
    context.log_event(AssetObservation("release", partition=key, metadata=metadata))
    if not found.holds:
        raise Failure(found.words, allow_retries=False)


@job(name=SPEED_JOB, partitions_def=RELEASES, executor_def=in_process_executor)
def speed_job() -> None:
    """A champion under the load that its release was measured with: is it as fast as it was?"""
    speed()
