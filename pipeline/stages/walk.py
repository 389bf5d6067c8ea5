"""A release walked as a run goes through it, on a shelf that hands out what was made before and makes nothing."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.stages import evaluation, promotion, table
from pipeline.stages.table import StageContext
from pipeline.store.artifacts import Artifact
from registry.verdict import Verdict


def walk(bench: StageContext) -> Iterator[tuple[str, Artifact | Verdict]]:
    """Go through a release as its run does: each stage's artifact, and each gate's verdict behind its evidence.

    The last is the signed release, or the verdict of a gate that refuses what is there.
    """
    yield "source", (source := table.source(bench))
    yield "quantized", (quantized := table.quantized(bench, source))
    yield "image", (image := table.image(bench, quantized))
    yield "baseline", (baseline := evaluation.baseline(bench, source))
    yield "drift", (drift := evaluation.drift(bench, source, baseline, quantized, image))
    yield "drift", (judged := bench.verdict("drift", drift))
    if judged.blocks:
        return
    yield "scan", (scan := table.scan(bench, image, quantized))
    yield "scan", (judged := bench.verdict("scan", scan))
    if judged.blocks:
        return
    yield "load", (load := table.load(bench, image, quantized))
    yield "load", (judged := bench.verdict("load", load))
    if judged.blocks:
        return
    yield "release", promotion.sealed(bench, source, quantized, drift, image, scan, load)


def signed(bench: StageContext) -> Artifact | None:
    """Walk to the end; return the signed release, or None where a gate refuses what is there."""
    *_, (_, last) = walk(bench)
    return last if isinstance(last, Artifact) else None
