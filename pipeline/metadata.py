"""The names that stages, gates and the command line agree on."""

from __future__ import annotations

STAGES = ("source", "quantized", "image", "baseline", "drift", "scan", "load", "release")

# Metadata that every stage's materialization carries; the release's adds RELEASE, a gate's evaluation VERDICT.
SECONDS, WORKER_SECONDS, CACHED = "seconds", "worker_seconds", "cached"
RELEASE, VERDICT = "release", "verdict"
