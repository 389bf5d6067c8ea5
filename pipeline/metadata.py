"""The names that stages, gates and the command line agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registry.verdict import Verdict

STAGES = ("source", "quantized", "image", "baseline", "drift", "scan", "load", "release")

# Metadata that every stage's materialization carries; the release's adds RELEASE, a gate's evaluation VERDICT.
SECONDS, WORKER_SECONDS, CACHED = "seconds", "worker_seconds", "cached"
RELEASE, VERDICT = "release", "verdict"


def judged(verdict: Verdict) -> dict[str, Any]:
    """What is told of a gate's verdict: all of it, and whether it stops what comes after."""
    return {"name": verdict.gate, **verdict.model_dump(mode="json"), "blocks": verdict.blocks}
