"""What can be run whole: a release, and the looks at what is released."""

from __future__ import annotations

from dagster import AssetSelection, define_asset_job, in_process_executor

from pipeline.orchestration.rescan_check import RESCAN
from pipeline.orchestration.speed_job import speed_job

# No asset may have these names: a job and the op of an asset share one name space.
RELEASE_JOB, RESCAN_JOB = "release_model", "rescan_champions"

_RESCAN = AssetSelection.checks(RESCAN)

# The heavy work happens in workers, so a process a step would only cost its start.
release_job = define_asset_job(
    RELEASE_JOB,
    selection=AssetSelection.all() - _RESCAN,
    executor_def=in_process_executor,
    description="One model in one scheme, from pinned weights to a promoted version.",
)
rescan_job = define_asset_job(
    RESCAN_JOB,
    selection=_RESCAN,
    executor_def=in_process_executor,
    description="Every champion under today's vulnerability database.",
)
ALL = (release_job, rescan_job, speed_job)
