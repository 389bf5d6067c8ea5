"""What operators' objects must be: KServe's own CRDs, and types that are generated from other operators' sources.

The types of npm's ``@kubernetes-models`` know required keys and the types of values, and ignore unknown keys.
"""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cel
import jsonschema_rs
from node_packages import install, node

from checkout import CHECKOUT

PACKAGE = CHECKOUT / "tests/kubernetes_models"
_KSERVE = CHECKOUT / "tests/data/kserve"
_GROUPS = {
    "argoproj.io": "argo-cd", "kustomize.toolkit.fluxcd.io": "flux-cd", "kyverno.io": "kyverno",
    "policies.kyverno.io": "kyverno", "monitoring.coreos.com": "prometheus-operator",
}  # fmt: skip
Object = dict[str, Any]


def source(document: Object) -> str | None:
    """Return what an object is validated with, and its version; None if it is one of Kubernetes itself."""
    group = document["apiVersion"].partition("/")[0]
    if group == "serving.kserve.io":
        return "KServe's CRD, aaac4e294dae"
    if group in _GROUPS:
        package = f"@kubernetes-models/{_GROUPS[group]}"
        return f"{package} {json.loads((PACKAGE / 'package.json').read_text())['dependencies'][package]}"
    return None


def of_kserve(document: Object) -> list[str]:
    """Return what KServe's CRD objects to: its schema, keys that it doesn't know, and its rules."""
    schema = _schema(document["kind"])
    wrong = [f"{error.instance_path}: {error.message}" for error in _validator(document["kind"]).iter_errors(document)]
    return wrong or list(_rules(schema, document))


def of_operators(documents: Sequence[Object], folder: Path) -> list[str | None]:
    """Return what its operator's type objects to in each object; ``folder`` is for npm's packages."""
    install(PACKAGE, folder)
    command = [node("node"), "validate.mjs"]
    done = subprocess.run(command, cwd=folder, input=json.dumps(documents).encode(), capture_output=True, check=True)
    return list(json.loads(done.stdout))


@cache
def _schema(kind: str) -> Object:
    return dict(json.loads(gzip.decompress((_KSERVE / f"{kind}.json.gz").read_bytes())))


@cache
def _validator(kind: str) -> jsonschema_rs.Validator:
    return jsonschema_rs.validator_for(_strict(_schema(kind)))


def _strict(schema: object) -> Any:  # noqa: ANN401 - a part of a JSON schema
    """Refuse keys that a structural schema doesn't know, which Kubernetes drops with a warning."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {
        key: {name: _strict(each) for name, each in value.items()} if key == "properties" else _strict(value)
        for key, value in schema.items()
    }
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    if schema.get("nullable"):
        found["type"] = [schema["type"], "null"]
    return found


def _rules(schema: Object, value: object) -> Iterator[str]:
    """Evaluate the CEL rules of a schema, where they apply; yield the messages of those that don't hold."""
    for each in schema.get("x-kubernetes-validations", ()):
        if cel.evaluate(each["rule"], cel.Context(variables={"self": value})) is not True:
            yield each["message"]
    if isinstance(value, dict):
        for key, inner in value.items():
            known = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
            yield from _rules(known if isinstance(known, dict) else {}, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _rules(schema.get("items", {}), inner)
