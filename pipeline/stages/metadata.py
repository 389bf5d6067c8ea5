"""The names that stages, gates and the command line agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registry.verdict import Verdict

STAGES = ("source", "quantized", "image", "baseline", "drift", "scan", "load", "release")

# Metadata that every stage's materialization carries; the release's adds RELEASE, a gate's evaluation VERDICT.
SECONDS, WORKER_SECONDS, CACHED, SIZE = "seconds", "worker_seconds", "cached", "size_bytes"
RELEASE, VERDICT = "release", "verdict"


def figures(metrics: Mapping[str, float], source_bytes: float, checkpoint_bytes: float) -> dict[str, float]:
    """The figures that a person wants on one line: of the gates' ``metrics`` and the sizes, those that are known.

    A size of 0 is of what was not made.
    """
    told: dict[str, float] = {}
    if checkpoint_bytes:
        told["size_bytes"] = float(checkpoint_bytes)
    if checkpoint_bytes and source_bytes:
        told["size_ratio"] = checkpoint_bytes / source_bytes
    if drops := [value for name, value in metrics.items() if name.endswith(".drop")]:
        told["accuracy_change"] = -max(drops)
    if increases := [value for name, value in metrics.items() if name.endswith(".increase")]:
        told["bits_per_byte_change"] = max(increases)
    return told | {name: metrics[name] for name in ("p95_latency_ms", "output_tokens_per_second") if name in metrics}


def judged(verdict: Verdict) -> dict[str, Any]:
    """What is told of a gate's verdict: all of it, and whether it stops what comes after."""
    return {"name": verdict.gate, **verdict.model_dump(mode="json"), "blocks": verdict.blocks}
