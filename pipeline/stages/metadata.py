"""The figures of stages and gates, under the names that Dagster's metadata and the command line share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from registry.verdict import Status, Verdict

# Metadata that every stage's materialization carries; the release's adds RELEASE, a gate's evaluation VERDICT.
SECONDS, WORKER_SECONDS, CACHED, SIZE = "seconds", "worker_seconds", "cached", "size_bytes"
RELEASE, VERDICT = "release", "verdict"


class ReleasedVersion(BaseModel):
    """A promoted release as events and metadata have it: its version in the registry, and its figures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    outcome: Literal["promoted", "up-to-date"]
    """`up-to-date` if no alias had to move."""
    version: str
    aliases: tuple[str, ...]
    manifest_digest: str
    image: str
    measured: Mapping[str, float]
    variants: Mapping[str, str] = {}
    """Of each serving variant, whether it passed, or why it is not listed."""
    weights: Mapping[str, str] = {}
    """The references of the weights without the runtime, an artifact and a volume, in the registry of the image."""


class GateResult(BaseModel):
    """A verdict as events and metadata have it; ``name`` is the gate's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    status: Status
    reason: str
    cause: str | None = None
    metrics: Mapping[str, float] = {}
    limits: Mapping[str, float] = {}
    accepted_because: str | None = None
    blocks: bool


def figures(metrics: Mapping[str, float], source_bytes: float, checkpoint_bytes: float) -> dict[str, float]:
    """Return what one line about a release shows, of the gates' ``metrics`` and the sizes, as far as they are known.

    A size of 0 means that the artifact was not made. Both are the same where there is no 16-bit model.
    """
    found: dict[str, float] = {}
    if checkpoint_bytes:
        found["size_bytes"] = float(checkpoint_bytes)
    if checkpoint_bytes and source_bytes not in {0, checkpoint_bytes}:
        found["size_ratio"] = checkpoint_bytes / source_bytes
    if drops := [value for name, value in metrics.items() if name.endswith(".drop")]:
        found["accuracy_change"] = -max(drops)
    if increases := [value for name, value in metrics.items() if name.endswith(".increase")]:
        found["bits_per_byte_change"] = max(increases)
    return found | {name: metrics[name] for name in ("p95_latency_ms", "output_tokens_per_second") if name in metrics}


def judged(verdict: Verdict) -> GateResult:
    """Return a verdict as metadata and events have it, with whether it blocks."""
    return GateResult(name=verdict.gate, blocks=verdict.blocks, **verdict.model_dump(exclude={"gate"}))
