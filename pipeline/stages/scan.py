"""The stage `scan`: vulnerabilities, secrets, misconfiguration and the SBOM of the very image that ships."""

from __future__ import annotations

from dataclasses import replace

from containers.image.build import release_layers
from containers.image.layout import write_layout
from containers.scan import scan as scans
from containers.scan import scan_gate, trivy
from containers.scan.evidence import read_scan
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext, prepared
from pipeline.stages.image import beside, record_of
from pipeline.stages.stage import Inputs, digests
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe, timed
from registry.digests import digest_of
from registry.verdict import Verdict


def prepare(context: StageContext, _inputs: Inputs) -> StageContext:
    """Look which vulnerability database the home has."""
    return replace(context, database=trivy.database(context.settings.home))


def recipe(context: StageContext, inputs: Inputs) -> Recipe:
    """The image and the database."""
    key = scans.scan_key(record_of(inputs["image"]).image_id, prepared(context.database))
    return Recipe("scan", inputs=digests(inputs), parameters=key, code=code_version(__name__))


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft) -> None:
    """Lay the image out in a folder, and scan that."""
    quantized, record, home = inputs["quantized"], record_of(inputs["image"]), context.settings.home
    own = beside(context, inputs, inputs["image"].folder)
    layers = release_layers(quantized.folder, quantized.sha256, own)
    folder = draft.scratch / record.tag.partition(":")[2]
    with context.cores(), timed(draft.worker_seconds):
        write_layout(record, layers, home, folder)
        purl = f"pkg:oci/{context.release_name}@{record.digest}"
        subject = scans.in_layout(folder, digest_of(record.configuration.encode()), purl)
        scans.scan(subject, home=home, folder=draft.folder, progress=context.progress)


def accept(context: StageContext, scan: Artifact) -> None:
    """Warn of what passes today and will not for long: a waiver that ends, a database that gets old."""
    for line in scan_gate.warnings(read_scan(scan.folder), context.spec.scan):
        context.progress(f"warning: {line}")


def judge(scan: Artifact, context: StageContext) -> Verdict:
    """Compare the findings with the model's policy."""
    return scan_gate.judge(read_scan(scan.folder), context.spec.scan)
