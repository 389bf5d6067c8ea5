"""The objects of a bundle in each format, as they reach a cluster, and where each is tabled in the documentation."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from bundle_evidence import GATEWAY, cluster, evidence, on_four_gpus
from custom_resources import source
from helm_python import Chart
from image_record import image_record

from checkout import CHECKOUT
from containers.kubernetes.admission import Admission
from containers.kubernetes.bundle import Form, Images, write_bundle
from registry.signing import load_or_create_key

FORMS: tuple[Form, ...] = get_args(Form)
RELEASES = {"demo": evidence, "four GPUs": on_four_gpus}
VERSIONS = ("1.29", "1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
_OF_KUSTOMIZE = "kustomize.config.k8s.io"
Object = dict[str, Any]


def bundle_objects(release: str, form: Form, folder: Path) -> list[Object]:
    """Write a bundle for a cluster with everything of its own, and return its objects; a chart's as Helm renders them.

    Left out is what never reaches a cluster: kustomize's own files, and what it adds to other objects (patches).
    """
    key = load_or_create_key(folder / "release.pem").public.pem().decode()
    write_bundle(
        RELEASES[release](), image_record(), folder / form,
        images=Images(gateway=GATEWAY), cluster=cluster(), admission=Admission((key,), 30), form=form,
    )  # fmt: skip
    return list(_charted(folder / form) if form == "helm" else _read(folder / form))


def row(document: Object, forms: str) -> str:
    """Return the table's row of an object that is validated."""
    by = source(document) or f"`kubernetes-validate` 1.37.0: Kubernetes {VERSIONS[0]} to {VERSIONS[-1]}"
    return f"| {document['kind']}, `{document['apiVersion']}` | {forms} | {by} |"


def guides() -> list[Object]:
    """Return the objects of Argo CD and Flux in the guide."""
    text = (CHECKOUT / "docs/how-to/deploy-with-argo-cd.md").read_text()
    blocks = re.findall(r"^ *```yaml title=.*?\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    found = (yaml.safe_load(textwrap.dedent(block)) for block in blocks)
    return [each for each in found if not each["apiVersion"].startswith(_OF_KUSTOMIZE)]


def _read(folder: Path) -> Iterator[Object]:
    for path in sorted(folder.rglob("*.yaml")):
        if path.name not in {"rules.yaml", "rules_test.yaml", "pull.yaml", "tokenizer.yaml"}:
            for document in yaml.safe_load_all(path.read_text()):
                if not document["apiVersion"].startswith(_OF_KUSTOMIZE):
                    yield document


def _charted(folder: Path) -> Iterator[Object]:
    values = {"autoscaling": {"enabled": True}, "monitoring": {"enabled": True}}
    with Chart.load(folder) as chart:
        rendered = chart.render(values, name="demo-awq", namespace="models")
    for path in sorted(rendered):
        if path.endswith(".yaml"):
            yield from (document for document in yaml.safe_load_all(rendered[path]) if document)
    for policies in (folder / "policies").glob("*.yaml"):
        yield from yaml.safe_load_all(policies.read_text())
