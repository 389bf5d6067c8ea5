"""What each asset shows in Dagster's UI, from its evidence. A stage without an entry shows its size and digest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from dagster import MetadataValue, TableColumn, TableRecord, TableSchema

from containers.scan.evidence import read_scan
from evals.drift.answers import read_answers
from evals.drift.pairs import read_drift
from evals.load.evidence import read_load_evidence
from evals.load.measurements import read_samples
from evals.load.requests import read_requests
from evals.report import drift_pictures, load_pictures, mixture_pictures, pictures
from evals.report.svg import as_markdown
from pipeline.quantization.quantize import QuantizationRecord
from pipeline.stages import drift as drift_stage
from pipeline.stages import load as load_stage
from pipeline.stages import scan as scan_stage
from pipeline.stages import tested_variants
from pipeline.stages.context import StageContext
from pipeline.stages.image import record_of
from pipeline.stages.metadata import RELEASE
from pipeline.stages.promotion import PromotedRelease
from pipeline.stages.stage import Stage
from pipeline.store.artifacts import Artifact
from registry.manifest import REPORT
from registry.verdict import Verdict

if TYPE_CHECKING:
    from dagster._core.definitions.metadata import RawMetadataValue

Metadata: TypeAlias = "dict[str, RawMetadataValue]"


def files(_context: StageContext, made: Artifact) -> Metadata:
    """A table of a checkpoint's files."""
    return {
        "files": MetadataValue.table(
            [
                TableRecord({"file": name, "bytes": file.size, "sha256": file.sha256})
                for name, file in made.files.items()
            ],
            TableSchema([TableColumn("file"), TableColumn("bytes", "int"), TableColumn("sha256")]),
        )
    }


def quantized(context: StageContext, made: Artifact) -> Metadata:
    """A table of the checkpoint's files; the formats of a mixture; how many calibration tokens reached each expert."""
    record = QuantizationRecord.model_validate(made.notes)
    shown = files(context, made)
    if record.mixture is not None:
        shown["formats"] = MetadataValue.md(as_markdown(mixture_pictures.mixture(record.mixture)))
    if not record.experts:
        return shown
    rows = [
        TableRecord({"layer": name, "experts": len(counts), "fewest tokens": min(counts), "most tokens": max(counts)})
        for name, counts in record.experts.items()
    ]
    columns = [
        TableColumn("layer"),
        *(TableColumn(name, "int") for name in ("experts", "fewest tokens", "most tokens")),
    ]
    return {**shown, "tokens of experts": MetadataValue.table(rows, TableSchema(columns))}


def answers(context: StageContext, made: Artifact) -> Metadata:
    """How many items of each task were answered, and by what; nothing where there is no 16-bit model to ask."""
    if context.spec.lacks_baseline:
        return {}
    found = read_answers(made.folder)
    return {
        **{f"items of {name}": len(task.items) for name, task in found.tasks.items()},
        "engine": MetadataValue.json(dict(found.engine)),
    }


def drift(context: StageContext, made: Artifact) -> Metadata:
    """What was lost, against its limits and item by item, and every figure of the drift gate."""
    judged = drift_stage.judge(made, context)
    pairs = read_drift(made.folder)
    drawn = (
        pictures.losses(judged),
        pictures.accuracy(pairs, context.scheme_name),
        pictures.bits(pairs, context.scheme_name),
        drift_pictures.divergence(pairs.divergence, judged.limits.get("divergence.max_mean"))
        if pairs.divergence
        else None,
        drift_pictures.layers(pairs.layers),
    )
    asked = {"suite": pairs.suite.name, "suite digest": pairs.suite.digest} if pairs.suite else {}
    return {"judged": _judged(judged), **asked, **_pictures(*drawn), **_figures(judged.metrics)}


def image(_context: StageContext, made: Artifact) -> Metadata:
    """What the image is and stands on."""
    record = record_of(made)
    names = ("reference", "base", "base_digest", "pins_digest", "runtime", "minimum_driver")
    return {
        **{name: str(getattr(record, name)) for name in names},
        "image size": f"{record.size_bytes / 1e9:.2f} GB",
    }


def scan(context: StageContext, made: Artifact) -> Metadata:
    """What was found, by severity, and with which database; no count where nothing could be found."""
    evidence = read_scan(made.folder)
    counts = {} if evidence.database.is_blind else evidence.counts
    found = [
        TableRecord({name: str(getattr(item, name)) for name in ("id", "severity", "package", "installed", "fixed")})
        for item in evidence.vulnerabilities[:100]
    ]
    return {
        "judged": _judged(scan_stage.judge(made, context)),
        **_pictures(pictures.vulnerabilities(evidence)),
        **{f"vulnerabilities {severity}": count for severity, count in counts.items()},
        "database": evidence.database.state,
        "packages": evidence.packages,
        **({"vulnerabilities": MetadataValue.table(found)} if found else {}),
    }


def load(context: StageContext, made: Artifact) -> Metadata:
    """How fast it answered, how much memory it took, and every figure of the load test."""
    evidence = read_load_evidence(made.folder)
    judged = load_stage.judge(made, context)
    samples = read_samples(made.folder)
    drawn = (
        pictures.latency(read_requests(made.folder), judged.limits),
        pictures.memory(samples, evidence.memory.limit_bytes, judged.limits.get("peak_memory_bytes")),
        load_pictures.capacity(evidence.capacity) if evidence.capacity else None,
    )
    findings = {"findings": "; ".join(evidence.findings)} if evidence.findings else {}
    return {"judged": _judged(judged), **findings, **_pictures(*drawn), **_figures(evidence.metrics)}


def variants(context: StageContext, made: Artifact) -> Metadata:
    """Which serving variants are listed, why others are not, and every figure of their gates."""
    described: Metadata = {}
    for variant in tested_variants.judged(made, context):
        described[variant.name] = str(variant)
        described |= {f"{variant.name}: {name}": value for name, value in _figures(variant.metrics).items()}
    return described


_DESCRIBED: Mapping[str, Callable[[StageContext, Artifact], Metadata]] = {
    "source": files,
    "quantized": quantized,
    "image": image,
    "baseline": answers,
    "drift": drift,
    "scan": scan,
    "load": load,
    "variants": variants,
}


def describe(stage: Stage, context: StageContext, made: Artifact) -> Metadata:
    """Return the metadata of a stage's artifact."""
    described = _DESCRIBED.get(stage.name)
    return {} if described is None else described(context, made)


def describe_promotion(context: StageContext, made: Artifact, promoted: PromotedRelease) -> Metadata:
    """Return where a promoted release's report, version and image are, and its figures as numbers to plot."""
    address, version = context.settings.mlflow_address, promoted.version
    return {
        "name": promoted.name,
        "version": version.version,
        "aliases": ", ".join(version.aliases),
        RELEASE: version.model_dump(mode="json"),
        "report": MetadataValue.url(f"{address}/{promoted.report}")
        if promoted.report
        else MetadataValue.path(made.folder / REPORT),
        "MLflow": MetadataValue.url(f"{address}/#/models/{promoted.name}/versions/{version.version}"),
        "image": version.image,
        **version.weights,
        **_figures(version.measured),
    }


def _judged(verdict: Verdict) -> str:
    return f"{verdict.status}: {verdict.reason}"


def _pictures(*drawn: str | None) -> Metadata:
    """One entry, for Dagster folds up markdown of more than 1,000 characters: a click shows all of an asset's."""
    shown = [as_markdown(svg) for svg in drawn if svg]
    return {"pictures": MetadataValue.md("\n\n".join(shown))} if shown else {}


def _figures(metrics: Mapping[str, float]) -> Metadata:
    return {name: float(value) for name, value in metrics.items()}
