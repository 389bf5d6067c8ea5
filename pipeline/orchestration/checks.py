"""The gates, as blocking checks: each judges its stage's evidence against the limits in the model's file.

They stop what is downstream in the same run. Promotion trusts none of them: it judges the evidence again.
"""

from collections.abc import Callable
from typing import Any

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
from pipeline.stages import table
from pipeline.stages.metadata import VERDICT, judged
from pipeline.store.artifacts import Artifact


def _gate(name: str) -> Callable[[Callable[..., Any]], AssetChecksDefinition]:
    """Make a blocking check of the asset ``name`` that is judged, and recorded, for each partition alone."""

    def decorate(decide: Callable[..., Any]) -> AssetChecksDefinition:
        with known_previews():
            return asset_check(asset=name, blocking=True, partitions_def=RELEASES)(decide)

    return decorate


@_gate("drift")
def drift_gate(
    context: AssetCheckExecutionContext, drift: Artifact, settings: ResourceParam[Settings]
) -> AssetCheckResult:
    """Is the candidate not worse than FP16 by more than its owner allows?"""
    return _decide(context, "drift", drift, settings)


@_gate("scan")
def scan_gate(
    context: AssetCheckExecutionContext, scan: Artifact, settings: ResourceParam[Settings]
) -> AssetCheckResult:
    """Is the image free of what the policy forbids?"""
    return _decide(context, "scan", scan, settings)


@_gate("load")
def load_gate(
    context: AssetCheckExecutionContext, load: Artifact, settings: ResourceParam[Settings]
) -> AssetCheckResult:
    """Does the container hold its service level under load?"""
    return _decide(context, "load", load, settings)


ALL = [drift_gate, scan_gate, load_gate]


def _decide(context: AssetCheckExecutionContext, gate: str, evidence: Artifact, settings: Settings) -> AssetCheckResult:
    spec, _ = spec_of(context, settings)
    verdict = table.verdict(gate, evidence, spec)
    if verdict.blocks:
        # In the run's own log, where one looks first: Dagster's error names the check and not the reason.
        context.log.error("the %s gate refuses: %s, %s", gate, verdict.status, verdict.reason)
    return AssetCheckResult(
        passed=not verdict.blocks,
        description=verdict.reason,
        metadata={
            "status": verdict.status,
            **{f"limit {name}": value for name, value in verdict.limits.items()},
            **verdict.metrics,
            VERDICT: MetadataValue.json(judged(verdict)),
        },
    )
