"""The bill of materials of a model: a CycloneDX 1.6 document for machine learning, made from the release's results.

It is a pure function, so that the same release has the same document: the serial number is derived from the content,
and the caller gives the time. https://cyclonedx.org/capabilities/mlbom/
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from registry.verdict import Verdict

KIND = "application/vnd.cyclonedx+json"
SPECIFICATION = "1.6"
CycloneDX = dict[str, Any]
"""An object of a CycloneDX document, by its schema."""


@dataclass(frozen=True)
class Companion:
    """What belongs to a model: an adapter, served or merged, or a draft model. Its origin, and each file's sha256."""

    uri: str
    revision: str
    files: Mapping[str, str]


@dataclass(frozen=True)
class Model:
    """The content of the bill of materials: a model's source, quantization, data sets and measured results.

    ``files`` has the sha256 of each file; ``datasets`` is name → (purpose, sha256).
    """

    name: str
    version: str
    base: str
    base_revision: str
    licence: str | None
    architecture: str
    quantization: Mapping[str, object]
    files: Mapping[str, str]
    datasets: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    adapters: Mapping[str, Companion] = field(default_factory=dict)
    merged: Companion | None = None
    draft_model: Companion | None = None
    original: tuple[str, str] | None = None
    """URI and revision of the 16-bit original, where the model was quantized before."""


def document(model: Model, verdicts: Sequence[Verdict], image_digest: str) -> CycloneDX:
    """Return the document: the model with its model card, the original model, and the data sets used."""
    metrics = [
        {"type": f"{verdict.gate}.{name}", "value": repr(value)}
        for verdict in verdicts
        for name, value in sorted(verdict.metrics.items())
    ]
    base = {
        "type": "machine-learning-model", "bom-ref": "base", "name": model.base, "version": model.base_revision,
        **_licensed(model.licence),
    }  # fmt: skip
    data = [
        {"type": "data", "bom-ref": f"data-{name}", "name": name, "description": use,
         "hashes": [{"alg": "SHA-256", "content": digest}]}
        for name, (use, digest) in sorted(model.datasets.items())
    ]  # fmt: skip
    parents = [base]
    if model.original is not None:
        name, version = model.original
        parents.append({**base, "bom-ref": "original", "name": name, "version": version})
    if model.merged is not None:
        parents.append(_companion("merged-adapter", model.merged, "LoRA adapter, merged into the weights"))
    quantized = {
        "type": "machine-learning-model", "bom-ref": "model", "name": model.name, "version": model.version,
        **_licensed(model.licence),
        "pedigree": {"ancestors": [{key: each[key] for key in each if key != "bom-ref"} for each in parents]},
        "modelCard": {
            "modelParameters": {
                "architectureFamily": "transformer", "modelArchitecture": model.architecture,
                "datasets": [{"ref": part["bom-ref"]} for part in data],
            },
            "quantitativeAnalysis": {"performanceMetrics": metrics},
        },
        "properties": [
            *({"name": f"slipway:quantization:{name}", "value": str(value)}
              for name, value in sorted(model.quantization.items())),
            *({"name": f"slipway:gate:{verdict.gate}", "value": verdict.status} for verdict in verdicts),
            {"name": "slipway:image", "value": image_digest},
        ],
        "components": _files(model.files),
    }  # fmt: skip
    adapters = [
        _companion(f"adapter-{name}", adapter, f"LoRA adapter, served as {name}")
        for name, adapter in sorted(model.adapters.items())
    ]
    drafting = (
        []
        if model.draft_model is None
        else [_companion("draft-model", model.draft_model, "drafts tokens for the model")]
    )
    beside = [*adapters, *drafting, *data]
    told: CycloneDX = {
        "bomFormat": "CycloneDX", "specVersion": SPECIFICATION, "version": 1,
        "metadata": {
            "component": quantized, "tools": {"components": [{"type": "application", "name": "slipway"}]},
        },
        "components": [*parents, *beside],
        "dependencies": [{"ref": "model", "dependsOn": [part["bom-ref"] for part in [*parents, *beside]]}],
    }  # fmt: skip
    content = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return {**told, "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, content)}"}


def _companion(reference: str, companion: Companion, description: str) -> CycloneDX:
    return {
        "type": "machine-learning-model",
        "bom-ref": reference,
        "name": companion.uri,
        "version": companion.revision,
        "description": description,
        "components": _files(companion.files),
    }


def _files(sha256: Mapping[str, str]) -> list[CycloneDX]:
    return [
        {"type": "file", "name": name, "hashes": [{"alg": "SHA-256", "content": digest}]}
        for name, digest in sorted(sha256.items())
    ]


def _licensed(licence: str | None) -> CycloneDX:
    return {} if licence is None else {"licenses": [{"license": {"name": licence}}]}
