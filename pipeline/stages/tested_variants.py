"""What the stage `variants` left: each variant's verdicts by the limits as they are now, and its evidence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from containers.image.serving import ServingConfiguration
from evals.drift import drift_gate
from evals.drift.pairs import read_drift
from evals.load import load_gate
from evals.load import variants as documents
from evals.load.evidence import read_load_evidence
from evals.load.variants import Variant
from pipeline.stages.context import StageContext
from pipeline.store.artifacts import Artifact
from registry.verdict import Verdict

EVIDENCE = {"drift.json": "drift", "load.json": "load", "requests.jsonl": "load", "memory.json": "load"}
"""A variant's files, and the stage that makes each; one that could not be measured has `FAILED` in their place."""
FAILED = "failed.txt"
SERVING = "serving.json"


def judged(variants: Artifact, context: StageContext) -> list[Variant]:
    """Judge each variant by the limits as they are now."""
    places = {name: variants.folder / documents.folder(name) for name in context.variants}
    return [_judged(place, replace(context, variant=name)) for name, place in places.items()]


def evidence(variants: Artifact, context: StageContext) -> list[str]:
    """The files of all variants, as paths in the artifact."""
    paths = [f"{documents.folder(name)}/{file}" for name in context.variants for file in EVIDENCE]
    return [path for path in paths if path in variants.files]


def _judged(folder: Path, context: StageContext) -> Variant:
    serving = ServingConfiguration.model_validate_json((folder / SERVING).read_bytes())
    failed = folder / FAILED
    if failed.exists():
        reason = failed.read_text(encoding="utf-8")
        verdicts = [Verdict(gate=drift_gate.GATE, status="inconclusive", cause="not-measured", reason=reason)]
    else:
        verdicts = [
            drift_gate.judge(read_drift(folder), context.evals, context.spec.serve.adapters),
            load_gate.judge(read_load_evidence(folder), context.spec.load),
        ]
    return Variant(name=context.variant or "", serving=serving, verdicts=tuple(verdicts))
