"""The last stage: everything that was found out, in one signed manifest; then one atomic promotion."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from containers.hardware.gpu import gpus
from containers.image.build import ImageRecord
from containers.sandbox.kernels import ComputedOn
from containers.scan import mlbom, scan_gate
from containers.scan.evidence import read_scan
from evals.drift.pairs import read_drift
from evals.load import cost as costs
from pipeline.errors import StoreError
from pipeline.stages.metadata import RELEASE, figures
from pipeline.stages.table import CODE, StageContext, sha256_of
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe
from pipeline.trust import signing_key, trust_of
from pipeline.workers.environments import pinned_version
from registry import catalog, seal
from registry.digests import digest_file
from registry.manifest import (
    EVIDENCE,
    REPORT,
    Accelerator,
    Calibration,
    FileRecord,
    Hardware,
    Image,
    Kernels,
    Quantizer,
    Source,
    utc_now,
)
from registry.promote import Champion, Promotion, in_place, promote
from registry.verdict import Verdict

# What goes with a release beside the checkpoint: each gate's evidence, and the SBOM.
_EVIDENCE: Mapping[str, tuple[str, ...]] = {
    "drift": ("drift.json",),
    "scan": ("scan.json", "trivy.json"),
    "load": ("load.json", "requests.jsonl", "memory.json"),
}
_SBOM = f"{EVIDENCE}/sbom.cdx.json"
_MLBOM = f"{EVIDENCE}/mlbom.cdx.json"
# Which artifact must have been made from which. `evaluation.drift` sees to FP16's answers.
_MADE_FROM: Mapping[str, tuple[str, ...]] = {
    "quantized": ("source",),
    "image": ("quantized",),
    "drift": ("quantized", "image"),
    "scan": ("image",),
    "load": ("image", "quantized"),
}


def sealed(bench: StageContext, *upstream: Artifact) -> Artifact:
    """Judge every gate's evidence again, and sign the release that it adds up to.

    ``upstream`` are the artifacts of source, quantized, drift, image, scan and load.

    Raises:
        StoreError: evidence is of another checkpoint or image than the one to release.
    """
    made = {artifact.stage: artifact for artifact in upstream}
    _check_chain(made)
    source, quantized, image = made["source"], made["quantized"], made["image"]
    evidence = {gate: made[gate] for gate in _EVIDENCE}
    verdicts = {gate: bench.verdict(gate, found) for gate, found in evidence.items()}
    key = signing_key(bench.settings)
    recipe = Recipe(
        "release",
        inputs={stage: artifact.digest for stage, artifact in made.items()},
        parameters={
            "model": bench.spec.model,
            "scheme": bench.scheme_name,
            "verdicts": {gate: judged.model_dump(mode="json") for gate, judged in verdicts.items()},
            "key": [key.public.keyid, *(hashlib.sha256(one).hexdigest() for one in key.certificates)],
            "cost": None if bench.spec.cost is None else bench.spec.cost.model_dump(mode="json"),
        },
        code=CODE["release"],
    )

    def make(draft: ArtifactDraft) -> None:
        files = {name: quantized.folder / name for name in quantized.files}
        for gate, names in _EVIDENCE.items():
            files |= {f"{EVIDENCE}/{name}": evidence[gate].folder / name for name in names}
        waived = scan_gate.waived(read_scan(evidence["scan"].folder), bench.spec.scan)
        files[f"{EVIDENCE}/waived.json"] = _listed(draft, waived)
        files[_SBOM] = made["scan"].folder / "sbom.cdx.json"
        files[f"{EVIDENCE}/image.json"] = image.folder / "image.json"
        seal.place(files, draft.folder)
        _write_cost(bench, draft)
        _write_mlbom(bench, draft, made, list(verdicts.values()))
        _write_report(bench, draft, made, verdicts, waived)
        record = ImageRecord.model_validate(image.document("image.json"))
        manifest = seal.describe(
            draft.folder,
            model=bench.spec.model,
            scheme=bench.scheme_name,
            source=_source(bench, source),
            quantizer=_quantizer(bench, quantized),
            gates=[(verdicts[gate], _cited(gate)) for gate in _EVIDENCE],
            image=Image(
                reference=record.reference,
                digest=record.digest,
                base_digest=record.base_digest,
                pins_digest=record.pins_digest,
                runtime=record.runtime,
                minimum_driver=record.minimum_driver,
            ),
            sbom=_SBOM,
            mlbom=_MLBOM,
            hardware=_hardware(evidence["load"]),
        )
        seal.seal(draft.folder, key, manifest)

    return bench.store.obtain(recipe, make)


def promoted(bench: StageContext, release: Artifact, *, candidate_only: bool = False) -> dict[str, Any]:
    """Register the sealed release and move the aliases; return what the command line and the UI tell of it.

    With ``candidate_only`` the champion stays, whatever the model's file says. The bills of materials are attached to
    the image first: what an alias names has them.

    Raises:
        DistributionError: the image's registry can't be reached, or has lost it; no alias moved.
        RegistryError: the release is not what was signed, a gate blocks, or MLflow can't be reached; no alias moved.
    """
    settings = bench.settings
    before = {v.version: v.aliases for v in catalog.current(settings.tracking_uri, bench.release_name)}
    _attach(bench, release)
    promotion = promote(
        release.folder,
        settings.tracking_uri,
        trust_of(settings),
        champion=_champion(bench, candidate_only=candidate_only),
        key=signing_key(settings),
        progress=bench.progress,
    )
    held = before.get(promotion.version) == promotion.aliases
    return {
        "name": promotion.name,
        "version": promotion.version,
        "aliases": ", ".join(promotion.aliases),
        "report": promotion.report,
        RELEASE: _released(release, promotion, "up-to-date" if held else "promoted"),
    }


def settled(bench: StageContext, release: Artifact, *, candidate_only: bool = False) -> dict[str, Any] | None:
    """Return what `promoted` would tell of a release whose aliases are in their places; None where one would move.

    What is attached to the image is looked after as by `promoted`, and its bytes are not read again.

    Raises:
        DistributionError: the image's registry can't be reached, or has lost it.
        RegistryError: the release is not what was signed, or the registry can't be read.
    """
    settings = bench.settings
    promotion = in_place(
        release.folder,
        settings.tracking_uri,
        trust_of(settings),
        champion=_champion(bench, candidate_only=candidate_only),
        key=signing_key(settings),
    )
    if promotion is None:
        return None
    _attach(bench, release)
    return _released(release, promotion, "up-to-date")


def _champion(bench: StageContext, *, candidate_only: bool) -> Champion:
    return "manual" if candidate_only else bench.spec.registry.champion


def _released(release: Artifact, promotion: Promotion, outcome: str) -> dict[str, Any]:
    manifest = release.document("release/manifest.json")
    return {
        "outcome": outcome,
        "version": promotion.version,
        "aliases": list(promotion.aliases),
        "manifest_digest": promotion.manifest_digest,
        "image": manifest["image"]["reference"],
        "measured": _measured(manifest),
    }


def _check_chain(made: Mapping[str, Artifact]) -> None:
    """Every artifact was made from those that are released with it: this very checkpoint, this very image."""
    others = [
        f"`{stage}` was not made from the `{of}` that is to be released"
        for stage, inputs in _MADE_FROM.items()
        for of in inputs
        if made[stage].inputs.get(of) != made[of].digest
    ]
    if others:
        raise StoreError(f"{'; '.join(others)}: run every stage again")


def _source(bench: StageContext, source: Artifact) -> Source:
    files = {name: FileRecord(sha256=entry["sha256"], size=entry["size"]) for name, entry in source.files.items()}
    return Source(uri=_public(bench.spec.source.uri), revision=source.notes["revision"], files=files)


def _quantizer(bench: StageContext, quantized: Artifact) -> Quantizer:
    record = quantized.notes
    calibration = record["calibration"]
    return Quantizer(
        backend=record["backend"],
        version=pinned_version(record["backend"]),
        method=record["method"],
        parameters=record["parameters"],
        calibration=Calibration(
            uri=bench.spec.calibration.uri.name,
            digest=f"sha256:{calibration['sha256']}",
            samples=calibration["samples"],
            max_tokens=calibration["max_tokens"],
        ),
        pins_digest=record["pins_digest"],
    )


def _hardware(load: Artifact) -> Hardware:
    """This machine, and what the load test's server said of its CPU and kernels."""
    here = seal.this_machine(
        [Accelerator(name=gpu.name, memory_bytes=gpu.memory_bytes, driver=gpu.driver) for gpu in gpus()]
    )
    told = _load_tested_on(load)
    kernels = told.kernels
    return here.model_copy(
        update={
            "instruction_set": told.instruction_set,
            "kernels": None
            if kernels is None
            else Kernels.model_validate(kernels.model_dump(exclude={"instruction_set", "cpu_model"})),
        }
    )


def _load_tested_on(load: Artifact) -> ComputedOn:
    return ComputedOn.model_validate(load.document("load.json")["server"].get("computed_on") or {})


def _cited(gate: str) -> list[str]:
    """The evidence that a gate's verdict rests on, as paths in the release."""
    names = [*_EVIDENCE[gate], *(["waived.json"] if gate == "scan" else [])]
    return [f"{EVIDENCE}/{name}" for name in names]


def _listed(draft: ArtifactDraft, waived: Sequence[scan_gate.Waived]) -> Path:
    """Write down what was let through in writing, with the days left on the day of the release."""
    path = draft.scratch / "waived.json"
    path.write_text(json.dumps([asdict(item) for item in waived], indent=1))
    return path


def _write_report(
    bench: StageContext,
    draft: ArtifactDraft,
    made: Mapping[str, Artifact],
    verdicts: Mapping[str, Verdict],
    waived: Sequence[scan_gate.Waived],
) -> None:
    from evals.report import report  # noqa: PLC0415 - templates and pictures, for the one time that a report is written
    from evals.report.pictures import Stage  # noqa: PLC0415

    source, quantized = made["source"], made["quantized"]
    subject = report.Subject(
        model=bench.spec.model,
        scheme=bench.scheme_name,
        created=utc_now(),
        source_bytes=source.size_bytes,
        released_bytes=quantized.size_bytes,
        stages=[Stage(each.stage, each.seconds, each.worker_seconds, cached=each.cached) for each in made.values()],
        facts={
            "source": _public(bench.spec.source.uri),
            "revision": source.notes["revision"],
            **_computed_on(made),
        },
        digests={stage: artifact.digest for stage, artifact in made.items()},
        waived={f"{item.id} in {item.package}": _in_words(item) for item in waived},
    )
    report.write(draft.folder / REPORT, subject, list(verdicts.values()), report.Evidence.read(draft.folder / EVIDENCE))


def _computed_on(made: Mapping[str, Artifact]) -> dict[str, str]:
    """What computed the answers and the load test, where that is known."""
    told = {f"{side} evaluated on": each for side, each in read_drift(made["drift"].folder).computed_on.items()}
    told["load-tested on"] = _load_tested_on(made["load"])
    return {label: str(each) for label, each in told.items() if each != ComputedOn()}


def _write_cost(bench: StageContext, draft: ArtifactDraft) -> None:
    """What a million tokens cost at this release's own throughput, where the model's file has prices."""
    folder = draft.folder / EVIDENCE
    lines = (folder / "requests.jsonl").read_text().splitlines()
    carried = costs.throughput(json.loads((folder / "load.json").read_text()), map(json.loads, lines))
    if bench.spec.cost is not None and carried is not None:
        (folder / "cost.json").write_text(json.dumps(costs.document(bench.spec.cost, carried), indent=1))


def _write_mlbom(
    bench: StageContext, draft: ArtifactDraft, made: Mapping[str, Artifact], verdicts: Sequence[Verdict]
) -> None:
    """The model's bill of materials: what it is made from, how, on which data, and what was measured."""
    source, quantized, spec = made["source"], made["quantized"], bench.spec
    record = quantized.notes
    data = {spec.calibration.uri.name: ("calibration", str(record["calibration"]["sha256"]))}
    for name, task in spec.evals.tasks.items():
        if task.data is not None:
            data[task.data.name] = (f"evaluation: {name}", digest_file(task.data))
    model = mlbom.Model(
        name=bench.release_name,
        version=quantized.digest,
        base=_public(spec.source.uri),
        base_revision=source.notes["revision"],
        licence=spec.license,
        architecture=(quantized.document("config.json").get("architectures") or ["unknown"])[0],
        quantization={"method": record["method"], "backend": record["backend"], **record["parameters"]},
        files=sha256_of(quantized),
        datasets=data,
    )
    image = made["image"].document("image.json")
    told = mlbom.document(model, verdicts, image["digest"])
    (draft.folder / _MLBOM).write_text(json.dumps(told, indent=1, sort_keys=True, allow_nan=False))


def _attach(bench: StageContext, release: Artifact) -> None:
    """Attach the bills of materials to the image in its registry, where it is in one."""
    image = release.document("release/evidence/image.json")
    if not image["pushed"]:
        return
    files = {Path(name).name: (mlbom.KIND, release.folder / name) for name in (_SBOM, _MLBOM)}
    for title, digest in mlbom.attach(image["reference"], files).items():
        bench.progress(f"attached {title} to {image['reference']} as {digest[:19]}")


def _in_words(item: scan_gate.Waived) -> str:
    """Who lets a finding through, why, and how long still."""
    left = "" if item.days_left is None else f", until {item.expires}, {item.days_left} days left"
    return f"{item.severity}, {item.by} by {item.owner}{left}: {item.reason}"


def _public(uri: str) -> str:
    """The URI as others may read it: of a local folder its name alone, for its place is nobody's business."""
    return f"file:{Path(uri).name}" if uri.startswith("file:") else uri


def _measured(manifest: Mapping[str, Any]) -> dict[str, float]:
    """The figures that a person wants on one line, from the verdicts' metrics."""
    metrics: dict[str, float] = {}
    for gate in manifest["gates"]:
        metrics |= gate["verdict"]["metrics"]
    before = sum(entry["size"] for entry in manifest["source"]["files"].values())
    after = sum(entry["size"] for name, entry in manifest["files"].items() if not name.startswith("release/"))
    return figures(metrics, before, after)
