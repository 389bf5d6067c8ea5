"""What was made from what: the manifest as SLSA provenance (v1) in an in-toto statement.

It says nothing that the manifest does not, and is made from it by a pure function; so verification makes it again and
compares. It is for those who read SLSA and not Slipway: policy engines, admission controllers. https://slsa.dev/spec/v1.0

The function is frozen, since what was signed must be made again to the byte: another one is another `BUILD`, beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from registry.digests import canonical_json, digest_of
from registry.manifest import ADAPTERS, DRAFT_MODEL, MANIFEST, Manifest, MergedAdapter, Source

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD = "urn:slipway:release:v1"


def statement(manifest: Manifest) -> bytes:
    """Return the statement in canonical JSON.

    Its subjects are the model's files, the image and the manifest; its dependencies the source, adapters, the draft
    model, the calibration, the image's base and the pins of both environments; its byproducts each gate's evidence,
    with the verdict, and the SBOM.
    """
    return canonical_json(
        {
            "_type": STATEMENT,
            "subject": list(_subjects(manifest)),
            "predicateType": PREDICATE,
            "predicate": {
                "buildDefinition": {
                    "buildType": BUILD,
                    "externalParameters": _parameters(manifest),
                    "internalParameters": {"hardware": manifest.hardware.model_dump(mode="json")},
                    "resolvedDependencies": list(_dependencies(manifest)),
                },
                "runDetails": {
                    "builder": {"id": BUILD},
                    "metadata": {"finishedOn": manifest.created},
                    "byproducts": list(_byproducts(manifest)),
                },
            },
        }
    )


def _parameters(manifest: Manifest) -> dict[str, object]:
    """What the release was asked to be; the first releases do not list the configurations that may be served."""
    parameters: dict[str, object] = {
        "model": manifest.model,
        "scheme": manifest.scheme,
        "source": _origin(manifest.source),
        "quantizer": {
            "backend": manifest.quantizer.backend,
            "version": manifest.quantizer.version,
            "method": manifest.quantizer.method,
            "parameters": dict(manifest.quantizer.parameters),
        },
        "runtime": manifest.image.runtime,
    }
    if manifest.baseline is not None:
        parameters["baseline"] = _origin(manifest.baseline)
    if manifest.source.adapter is not None:
        parameters["adapter"] = _origin(manifest.source.adapter)
    if manifest.serving:
        parameters["serving"] = [each.model_dump(mode="json") for each in manifest.serving]
    return parameters


def _origin(part: Source | MergedAdapter) -> Mapping[str, str]:
    return {"uri": part.uri, "revision": part.revision}


def _subjects(manifest: Manifest) -> Iterator[Mapping[str, object]]:
    for name, record in sorted(manifest.files.items()):
        if not name.startswith("release/"):
            yield {"name": name, "digest": {"sha256": record.sha256}}
    yield {"name": manifest.image.reference, "digest": _digest(manifest.image.digest)}
    yield {"name": MANIFEST, "digest": _digest(digest_of(manifest.canonical()))}


def _dependencies(manifest: Manifest) -> Iterator[Mapping[str, object]]:
    source, quantizer, image = manifest.source, manifest.quantizer, manifest.image
    yield from _pulled("source", source)
    if manifest.baseline is not None:
        yield from _pulled("baseline", manifest.baseline)
    if source.adapter is not None:
        merged = source.adapter
        yield {"name": "merged adapter", "uri": merged.uri, "annotations": {"revision": merged.revision}}
        for name, record in sorted(merged.files.items()):
            yield {"name": f"merged adapter/{name}", "digest": {"sha256": record.sha256}}
        yield {"name": "merge's pins", "digest": _digest(merged.pins_digest)}
    for adapter, released in sorted(manifest.adapters.items()):
        yield {"name": f"adapter {adapter}", "uri": released.uri, "annotations": {"revision": released.revision}}
        for name, record in sorted(released.files.items()):
            yield {"name": f"{ADAPTERS}/{adapter}/{name}", "digest": {"sha256": record.sha256}}
    if manifest.draft_model is not None:
        drafting = manifest.draft_model
        yield {"name": "draft model", "uri": drafting.uri, "annotations": {"revision": drafting.revision}}
        for name, record in sorted(drafting.files.items()):
            yield {"name": f"{DRAFT_MODEL}/{name}", "digest": {"sha256": record.sha256}}
    if quantizer.calibration is not None:
        calibration = quantizer.calibration
        yield {"name": "calibration", "uri": calibration.uri, "digest": _digest(calibration.digest)}
        for data in calibration.data:
            annotations = {"weight": data.weight, **({} if data.revision is None else {"revision": data.revision})}
            yield {"name": "calibration data", "uri": data.uri, "annotations": annotations}
            for name, digest in sorted(data.files.items()):
                yield {"name": f"calibration data/{name}", "digest": _digest(digest)}
    if quantizer.pins_digest is not None:
        yield {"name": "quantizer's pins", "digest": _digest(quantizer.pins_digest)}
    yield {"name": "image's base", "digest": _digest(image.base_digest)}
    yield {"name": "image's pins", "digest": _digest(image.pins_digest)}


def _pulled(what: str, source: Source) -> Iterator[Mapping[str, object]]:
    yield {"name": what, "uri": source.uri, "annotations": {"revision": source.revision}}
    for name, record in sorted(source.files.items()):
        yield {"name": f"{what}/{name}", "digest": {"sha256": record.sha256}}


def _byproducts(manifest: Manifest) -> Iterator[Mapping[str, object]]:
    for gate in manifest.gates:
        verdict = gate.verdict
        annotations = {"gate": verdict.gate, "status": verdict.status, "reason": verdict.reason}
        for name, digest in sorted(gate.evidence.items()):
            yield {"name": name, "digest": _digest(digest), "annotations": annotations}
    yield {"name": manifest.sbom.path, "digest": _digest(manifest.sbom.digest)}


def _digest(digest: str) -> Mapping[str, str]:
    algorithm, _, value = digest.partition(":")
    return {algorithm: value}
