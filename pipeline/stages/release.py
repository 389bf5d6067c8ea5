"""The stage `release`: every gate's evidence and the checkpoint, under one signed manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from containers.hardware.gpu import gpus
from containers.image import build as images
from containers.image import profile as profiles
from containers.sandbox.kernels import ComputedOn
from containers.scan import mlbom, scan_gate
from containers.scan.evidence import read_scan
from evals.drift import mixture
from evals.drift.pairs import read_drift
from evals.load import cost as costs
from evals.load.evidence import read_load_evidence
from evals.load.requests import read_requests
from evals.load.variants import FILE as VARIANTS
from evals.load.variants import Variant, write_variants
from pipeline.quantization.quantize import QuantizedNotes
from pipeline.sources import source as sources
from pipeline.stages import calibration, draft_model
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext, prepared
from pipeline.stages.image import record_of, serving_of
from pipeline.stages.pulled_adapters import files_of, read_adapters
from pipeline.stages.stage import Gate, Inputs, digests
from pipeline.stages.tested_variants import evidence, judged
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe
from pipeline.store.notes import SourceNotes
from pipeline.trust import signing_key, signing_key_if_any
from pipeline.workers.environments import pinned_version
from registry import seal
from registry.digests import digest_file
from registry.manifest import (
    ADAPTERS,
    DRAFT_MODEL,
    EVIDENCE,
    REPORT,
    Accelerator,
    Calibration,
    CalibrationData,
    Hardware,
    Image,
    Kernels,
    MergedAdapter,
    Quantizer,
    ReleasedAdapter,
    ReleasedDraftModel,
    ServedConfiguration,
    Source,
    utc_now,
)

Gates = Mapping[str, Gate]

SBOM = f"{EVIDENCE}/sbom.cdx.json"
MLBOM = f"{EVIDENCE}/mlbom.cdx.json"


def prepare(context: StageContext, inputs: Inputs, *, gates: Gates) -> StageContext:
    """Judge every gate's evidence again, and load the key that signs. A first release makes the key.

    A dry run has judged the evidence already.
    """
    key = signing_key_if_any(context.settings) if context.dry else signing_key(context.settings)
    verdicts = context.verdicts or {name: gate.judge(inputs[name], context) for name, gate in gates.items()}
    return replace(context, key=key, verdicts=verdicts)


def recipe(context: StageContext, inputs: Inputs) -> Recipe:
    """Everything before, the verdicts by the limits as they are now, and the key."""
    spec, key = context.spec, context.key
    signer = None if key is None else [key.public.keyid, *(hashlib.sha256(one).hexdigest() for one in key.certificates)]
    return Recipe(
        "release",
        inputs=digests(inputs),
        parameters={
            "model": spec.model,
            "scheme": context.scheme_name,
            "verdicts": {name: verdict.model_dump(mode="json") for name, verdict in context.verdicts.items()},
            "variants": [variant.model_dump(mode="json") for variant in judged(inputs["variants"], context)],
            "key": signer,
            "cost": None if spec.cost is None else spec.cost.model_dump(mode="json"),
        },
        code=code_version(__name__),
    )


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft, *, gates: Gates) -> None:
    """Gather the evidence and sign it.

    Raises:
        SigningError: a gate blocks.
    """
    source, quantized = inputs["source"], inputs["quantized"]
    files = {name: (quantized, name) for name in quantized.files}
    for name, gate in gates.items():
        files |= {f"{EVIDENCE}/{file}": (inputs[name], file) for file in gate.evidence}
    measured = inputs["variants"]
    files |= {f"{EVIDENCE}/{path}": (measured, path) for path in evidence(measured, context)}
    adapters = _adapters(inputs["adapters"])
    for name, adapter in adapters.items():
        files |= {f"{ADAPTERS}/{name}/{file}": (inputs["adapters"], f"{name}/{file}") for file in adapter.files}
    drafting = draft_model.released(inputs["image"])
    if drafting is not None:
        files |= {path: (inputs["image"], path) for path in (f"{DRAFT_MODEL}/{file}" for file in drafting.files)}
    files[SBOM] = (inputs["scan"], "sbom.cdx.json")
    files[f"{EVIDENCE}/image.json"] = (inputs["image"], "image.json")
    waived = scan_gate.waived(read_scan(inputs["scan"].folder), context.spec.scan)
    placed = {name: artifact.folder / file for name, (artifact, file) in files.items()}
    seal.place({**placed, f"{EVIDENCE}/waived.json": _listed(draft, waived)}, draft.folder)
    tested = judged(measured, context)
    if tested:
        write_variants(draft.folder / EVIDENCE / VARIANTS, tested)
    _write_cost(context, draft)
    _write_mixture(quantized, draft)
    _write_mlbom(context, draft, inputs)
    _write_report(context, draft, inputs, waived)
    record = record_of(inputs["image"])
    manifest = seal.describe(
        draft.folder,
        model=context.spec.model,
        scheme=context.scheme_name,
        source=_source(context, inputs),
        baseline=_baseline(context, source),
        quantizer=_quantizer(context, quantized),
        gates=[(context.verdicts[name], _cited(name, gate)) for name, gate in gates.items()],
        image=Image(
            reference=record.reference,
            digest=record.digest,
            base_digest=record.base_digest,
            pins_digest=record.pins_digest,
            runtime=record.runtime,
            minimum_driver=record.minimum_driver,
        ),
        serving=_serving(context, inputs, tested),
        adapters=adapters,
        draft_model=drafting,
        sbom=SBOM,
        mlbom=MLBOM,
        hardware=_hardware(inputs["load"]),
        known={name: artifact.files[file] for name, (artifact, file) in files.items()},
    )
    draft.sha256.update({name: file.sha256 for name, file in manifest.files.items()})
    seal.seal(draft.folder, prepared(context.key), manifest)


def _cited(name: str, gate: Gate) -> list[str]:
    """The evidence that a gate's verdict rests on, as paths in the release."""
    return [f"{EVIDENCE}/{file}" for file in (*gate.evidence, *(["waived.json"] if name == "scan" else []))]


def _source(context: StageContext, inputs: Inputs) -> Source:
    """Where the weights came from that were quantized, or that were published so."""
    source, quantized, uri = inputs["source"], inputs["quantized"], sources.public_uri(context.spec.source.uri)
    if (revision := quantized.noted(QuantizedNotes).revision) is not None:
        return Source(uri=uri, revision=revision, files=quantized.files)
    notes = source.noted(SourceNotes)
    if notes.merged is None:
        return Source(uri=uri, revision=notes.revision, files=source.files)
    return Source(uri=uri, revision=notes.revision, files=notes.merged.base, adapter=notes.merged.adapter)


def _baseline(context: StageContext, source: Artifact) -> Source | None:
    """The 16-bit original, where the weights were published in few bits."""
    wanted = context.spec.baseline
    if wanted is None:
        return None
    revision = source.noted(SourceNotes).revision
    return Source(uri=sources.public_uri(wanted.uri), revision=revision, files=source.files)


def _serving(context: StageContext, inputs: Inputs, tested: Sequence[Variant]) -> tuple[ServedConfiguration, ...]:
    """The configurations that passed: the main one, and the variants that no gate blocks."""
    profile = profiles.load(context.spec.runtime)
    passed = (serving_of(context, inputs), *(variant.serving for variant in tested if variant.passed))
    return tuple(serving.record(images.command(profile, context.spec.model, serving)) for serving in passed)


def _adapters(artifact: Artifact) -> dict[str, ReleasedAdapter]:
    """The adapters that are part of the release, with the digest of each file."""
    return {
        name: ReleasedAdapter(
            uri=each.uri,
            revision=each.revision,
            rank=each.rank,
            modules=each.modules,
            files={file: artifact.files[f"{name}/{file}"] for file in files_of(artifact, name)},
        )
        for name, each in read_adapters(artifact).items()
    }


def _quantizer(context: StageContext, quantized: Artifact) -> Quantizer:
    record = quantized.noted(QuantizedNotes)
    return Quantizer(
        backend=record.backend,
        version="as published" if record.backend == "none" else pinned_version(record.backend),
        method=record.method,
        parameters=record.parameters,
        calibration=_calibration(context, record),
        pins_digest=record.pins_digest,
    )


def _calibration(context: StageContext, record: QuantizedNotes) -> Calibration | None:
    used, text = record.calibration, context.calibration
    if used is None or text is None:
        return None
    whole = not text.mixture and text.is_here
    return Calibration(
        uri="mixture" if text.mixture else _shown(text.uri),
        digest=f"sha256:{used.sha256}",
        samples=used.samples,
        max_tokens=used.max_tokens,
        cut=used.cut,
        empty=used.empty,
        data=() if whole else tuple(_calibration_data(context)),
    )


def _calibration_data(context: StageContext) -> Iterator[CalibrationData]:
    """Each source of the calibration, with the digests of its files, and a data set's commit."""
    resolved = calibration.resolve(context.spec, context.settings)
    for number, source in enumerate(context.spec.calibration.data):
        uri, revision = _shown(source.uri), None
        if number in resolved:
            uri, revision = resolved[number].uri, resolved[number].revision
            files = {file.path: f"sha256:{file.sha256}" for file in resolved[number].files}
        else:
            files = {uri: f"sha256:{digest_file(source.path)}"}
        yield CalibrationData(uri=uri, revision=revision, files=files, weight=source.weight)


def _shown(uri: str) -> str:
    """Calibration data as a release names it: a file by its name alone."""
    return sources.public_uri(uri).removeprefix("file:")


def _hardware(load: Artifact) -> Hardware:
    """This machine, with the CPU and the kernels that the load test's server reported."""
    here = seal.this_machine(
        [Accelerator(name=gpu.name, memory_bytes=gpu.memory_bytes, driver=gpu.driver) for gpu in gpus()]
    )
    tested = _load_tested_on(load)
    kernels = tested.kernels
    return here.model_copy(
        update={
            "instruction_set": tested.instruction_set,
            "kernels": None
            if kernels is None
            else Kernels.model_validate(kernels.model_dump(exclude={"instruction_set", "cpu_model"})),
        }
    )


def _load_tested_on(load: Artifact) -> ComputedOn:
    return read_load_evidence(load.folder).server.computed_on or ComputedOn()


def _listed(draft: ArtifactDraft, waived: Sequence[scan_gate.Waived]) -> Path:
    """Write the findings that a waiver let through, each with its days left on the day of the release."""
    path = draft.scratch / "waived.json"
    path.write_text(json.dumps([asdict(item) for item in waived], indent=1))
    return path


def _write_report(
    context: StageContext,
    draft: ArtifactDraft,
    inputs: Inputs,
    waived: Sequence[scan_gate.Waived],
) -> None:
    from evals.report import report  # noqa: PLC0415 - templates and pictures are loaded when a report is written
    from evals.report.pictures import StageTime  # noqa: PLC0415

    source, quantized = inputs["source"], inputs["quantized"]
    notes, origin = source.noted(SourceNotes), _source(context, inputs)
    baseline = _baseline(context, source)
    merged = None if notes.merged is None else notes.merged.adapter
    calibrated = _calibration(context, quantized.noted(QuantizedNotes))
    drafting = draft_model.released(inputs["image"])
    served_with = serving_of(context, inputs).engine_arguments(profiles.load(context.spec.runtime))
    subject = report.ReportedRelease(
        model=context.spec.model,
        scheme=context.scheme_name,
        created=utc_now(),
        source_bytes=None if context.spec.lacks_baseline else source.size_bytes,
        released_bytes=quantized.size_bytes,
        stages=[
            StageTime(name, each.seconds, each.worker_seconds, cached=each.cached) for name, each in inputs.items()
        ],
        facts={
            "source": origin.uri,
            "revision": origin.revision,
            **({} if baseline is None else {"compared with": f"{baseline.uri} at {baseline.revision}"}),
            **({} if merged is None else {"merged adapter": f"{merged.uri} at {merged.revision}"}),
            **({} if calibrated is None else {"calibration": f"{calibrated.uri}, {calibrated.summary}"}),
            **({} if drafting is None else {"draft model": f"{drafting.uri} at {drafting.revision}"}),
            "served with": " ".join(served_with),
            **_computed_on(inputs),
        },
        digests=digests(inputs),
        waived={f"{item.id} in {item.package}": _in_words(item) for item in waived},
    )
    evidence = report.ReportEvidence.read(draft.folder / EVIDENCE)
    report.write(draft.folder / REPORT, subject, list(context.verdicts.values()), evidence)


def _computed_on(inputs: Inputs) -> dict[str, str]:
    """What computed the answers and the load test, where that is known."""
    found = {f"{side} evaluated on": each for side, each in read_drift(inputs["drift"].folder).computed_on.items()}
    found["load-tested on"] = _load_tested_on(inputs["load"])
    return {label: str(each) for label, each in found.items() if each != ComputedOn()}


def _write_cost(context: StageContext, draft: ArtifactDraft) -> None:
    """The price of a million tokens at this release's own throughput, where the model's file has prices."""
    folder = draft.folder / EVIDENCE
    throughput = costs.throughput(read_load_evidence(folder), read_requests(folder))
    if context.spec.cost is not None and throughput is not None:
        (folder / costs.FILE).write_text(costs.cost_evidence(context.spec.cost, throughput).format())


def _write_mixture(quantized: Artifact, draft: ArtifactDraft) -> None:
    """Which layers have which format, and what that loses, where the scheme mixes formats."""
    found = quantized.noted(QuantizedNotes).mixture
    if found is not None:
        (draft.folder / EVIDENCE / mixture.FILE).write_text(found.format())


def _write_mlbom(context: StageContext, draft: ArtifactDraft, inputs: Inputs) -> None:
    """The model's bill of materials: its source, quantizer and data, and what was measured."""
    source, quantized, spec = inputs["source"], inputs["quantized"], context.spec
    record, notes = quantized.noted(QuantizedNotes), source.noted(SourceNotes)
    drafting = draft_model.released(inputs["image"])
    origin, baseline = _source(context, inputs), _baseline(context, source)
    data: dict[str, tuple[str, str]] = {}
    if context.calibration is not None:
        for each in _calibration_data(context):
            for name, digest in each.files.items():
                path = name if each.revision is None else f"{each.uri}/{name}"
                data[path] = ("calibration", digest.removeprefix("sha256:"))
    for name, task in spec.evals.tasks.items():
        if task.data is not None:
            data[task.data.name] = (f"evaluation: {name}", digest_file(task.data))
    model = mlbom.Model(
        name=context.release_name,
        version=quantized.digest,
        base=origin.uri,
        base_revision=origin.revision,
        licence=spec.license,
        architecture=(quantized.document("config.json").get("architectures") or ["unknown"])[0],
        quantization={"method": record.method, "backend": record.backend, **record.parameters},
        files=quantized.sha256,
        datasets=data,
        adapters={name: _companion(each) for name, each in _adapters(inputs["adapters"]).items()},
        merged=None if notes.merged is None else _companion(notes.merged.adapter),
        draft_model=None if drafting is None else _companion(drafting),
        original=None if baseline is None else (baseline.uri, baseline.revision),
    )
    document = mlbom.document(model, list(context.verdicts.values()), record_of(inputs["image"]).digest)
    (draft.folder / MLBOM).write_text(json.dumps(document, indent=1, sort_keys=True, allow_nan=False))


def _companion(part: ReleasedAdapter | MergedAdapter | ReleasedDraftModel) -> mlbom.Companion:
    return mlbom.Companion(part.uri, part.revision, {path: file.sha256 for path, file in part.files.items()})


def _in_words(item: scan_gate.Waived) -> str:
    """A waiver: its severity, owner, reason, and the days that it has left."""
    left = "" if item.days_left is None else f", until {item.expires}, {item.days_left} days left"
    return f"{item.severity}, {item.by} by {item.owner}{left}: {item.reason}"
