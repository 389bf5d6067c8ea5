"""Dagster's checks: one for each gate of the table, which blocks what comes after it in the same run.

Promotion does not rely on them: it judges the evidence again.
"""

from collections.abc import Mapping

from dagster import (
    AssetCheckExecutionContext,
    AssetCheckResult,
    AssetChecksDefinition,
    MetadataValue,
    ResourceParam,
    asset_check,
)

from pipeline.orchestration.partitions import RELEASES, spec_of
from pipeline.orchestration.previews import known_previews
from pipeline.settings import Settings
from pipeline.stages.context import StageContext
from pipeline.stages.metadata import VERDICT, judged
from pipeline.stages.stage import Gate
from pipeline.stages.table import STAGES
from pipeline.store.artifacts import Artifact


def _check(stage: str, gate: Gate) -> AssetChecksDefinition:
    """Make the blocking check of a stage's asset; each partition has its own verdict."""

    def decide(
        context: AssetCheckExecutionContext, settings: ResourceParam[Settings], evidence: Artifact
    ) -> AssetCheckResult:
        spec, scheme = spec_of(context, settings)
        verdict = gate.judge(evidence, StageContext(spec, scheme, settings, context.log.info))
        if verdict.blocks:
            # Dagster's own error names the check and not the reason, and the run's log is where a person looks first.
            context.log.error("the %s gate refuses: %s, %s", stage, verdict.status, verdict.reason)
        return AssetCheckResult(
            passed=not verdict.blocks,
            description=verdict.reason,
            metadata={
                "status": verdict.status,
                **{f"limit {name}": value for name, value in verdict.limits.items()},
                **verdict.metrics,
                VERDICT: MetadataValue.json(judged(verdict).model_dump(mode="json")),
            },
        )

    with known_previews():
        return asset_check(
            asset=stage,
            name=f"{stage}_gate",
            description=gate.question,
            blocking=True,
            partitions_def=RELEASES,
        )(decide)


BY_STAGE: Mapping[str, AssetChecksDefinition] = {
    stage.name: _check(stage.name, stage.gate) for stage in STAGES if stage.gate
}
ALL = list(BY_STAGE.values())
