"""The figures of stages and gates, under the names that Dagster's metadata and the command line share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registry.verdict import Verdict

# Metadata that every stage's materialization carries; the release's adds RELEASE, a gate's evaluation VERDICT.
SECONDS, WORKER_SECONDS, CACHED, SIZE = "seconds", "worker_seconds", "cached", "size_bytes"
RELEASE, VERDICT = "release", "verdict"


def figures(metrics: Mapping[str, float], source_bytes: float, checkpoint_bytes: float) -> dict[str, float]:
    """Return what one line about a release shows, of the gates' ``metrics`` and the sizes, as far as they are known.

    A size of 0 means that the artifact was not made.
    """
    found: dict[str, float] = {}
    if checkpoint_bytes:
        found["size_bytes"] = float(checkpoint_bytes)
    if checkpoint_bytes and source_bytes:
        found["size_ratio"] = checkpoint_bytes / source_bytes
    if drops := [value for name, value in metrics.items() if name.endswith(".drop")]:
        found["accuracy_change"] = -max(drops)
    if increases := [value for name, value in metrics.items() if name.endswith(".increase")]:
        found["bits_per_byte_change"] = max(increases)
    return found | {name: metrics[name] for name in ("p95_latency_ms", "output_tokens_per_second") if name in metrics}


def judged(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as metadata and events have it, with whether it blocks."""
    return {"name": verdict.gate, **verdict.model_dump(mode="json"), "blocks": verdict.blocks}
