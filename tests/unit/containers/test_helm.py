"""The bundle as a Helm chart, rendered by Helm's own library and held to what kustomize builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from bundle_evidence import DIGEST, GATEWAY, cluster, evidence, on_gpu, written
from helm_python import Chart, HelmError, lint
from image_record import image_record

from containers.kubernetes.bundle import Images, write_bundle
from containers.kubernetes.numbers import BundleEvidence
from unit.containers.test_kubernetes import kustomized

OPERATORS = {"ServiceMonitor", "PrometheusRule"}
EVERYTHING = {"autoscaling": {"enabled": True}, "monitoring": {"enabled": True}}
Object = dict[str, Any]


def charted(given: BundleEvidence, folder: Path, *, own: bool = False) -> Path:
    placed = cluster() if own else None
    write_bundle(given, image_record(), folder, images=Images(gateway=GATEWAY), cluster=placed, form="helm")
    return folder


def rendered(folder: Path, values: Object | None = None) -> list[Object]:
    with Chart.load(folder) as chart:
        found = chart.render(values, name="demo-awq", namespace="models")
    texts = (text for path, text in sorted(found.items()) if path.endswith(".yaml"))
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def of_kind(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


@pytest.fixture(params=["cpu", "gpu", "cpu-own", "gpu-own"])
def given(request: pytest.FixtureRequest) -> tuple[BundleEvidence, bool]:
    device, _, own = request.param.partition("-")
    return (evidence() if device == "cpu" else on_gpu()), bool(own)


def test_the_chart_is_the_bundle_that_kustomize_builds(given: tuple[BundleEvidence, bool], tmp_path: Path) -> None:
    release, own = given
    written(release, tmp_path / "bundle", cluster() if own else None)
    overlay = tmp_path / "bundle/overlays/all"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        "resources: [../../base]\ncomponents: [../../monitoring, ../../autoscaling]\n"
    )
    built = kustomized(overlay)
    (hashed,) = {each["metadata"]["name"] for each in built if "routes.json" in each.get("data", {})}
    ours = rendered(charted(release, tmp_path / "chart", own=own), {"monitoring": {"enabled": True}})
    scaled = rendered(tmp_path / "chart", EVERYTHING)
    ours += [each for each in scaled if each["kind"] == "HorizontalPodAutoscaler"]

    def plain(document: Object) -> str:
        """Without what the tools themselves add: names with hashes, namespaces, who manages it."""
        document["metadata"].pop("namespace", None)
        pod = document["spec"].get("template", {}) if "spec" in document else {}
        pod.get("metadata", {}).pop("annotations", None)
        text = str(yaml.safe_dump(document)).replace(hashed, "demo-awq-gateway")
        return text.replace("managed-by: slipway", "managed-by: Helm").replace(
            "namespace: slipway", "namespace: models"
        )

    assert sorted(map(plain, ours)) == sorted(map(plain, built))


def test_helm_finds_nothing_to_say_and_every_object_is_valid(
    given: tuple[BundleEvidence, bool], tmp_path: Path
) -> None:
    release, own = given
    folder = charted(release, tmp_path / "chart", own=own)
    said = lint(folder, strict=True)
    assert [each["error"] for each in said["messages"]] == ["icon is recommended"]
    assert not said["errors"]
    for document in rendered(folder, EVERYTHING):
        if document["kind"] not in OPERATORS:
            kubernetes_validate.validate(document, "1.37", strict=True)


def test_values_change_what_an_operator_decides_and_not_the_digest(tmp_path: Path) -> None:
    values = {
        "image": {"repository": "mirror.example/demo"}, "replicas": 5, "resources": {"cpu": "500m"},
        "gateway": {"replicas": 3},
    }  # fmt: skip
    found = rendered(charted(on_gpu(), tmp_path / "chart"), values)
    engine = of_kind(found, "Deployment", "demo-awq-engine")["spec"]
    (container,) = engine["template"]["spec"]["containers"]
    assert container["image"] == f"mirror.example/demo@{DIGEST}"
    assert (engine["replicas"], container["resources"]["requests"]["cpu"]) == (5, "500m")
    gateway = of_kind(found, "Deployment", "demo-awq-gateway")["spec"]
    assert gateway["replicas"] == 3
    assert gateway["template"]["spec"]["initContainers"][0]["image"] == f"mirror.example/demo@{DIGEST}"


def test_the_autoscaler_alone_sets_the_number_of_replicas(tmp_path: Path) -> None:
    found = rendered(charted(on_gpu(), tmp_path / "chart"), {"autoscaling": {"enabled": True, "maxReplicas": 7}})
    assert "replicas" not in of_kind(found, "Deployment", "demo-awq-engine")["spec"]
    scaler = of_kind(found, "HorizontalPodAutoscaler", "demo-awq-engine")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 7)


def test_a_changed_route_restarts_the_gateway(tmp_path: Path) -> None:
    sums = []
    for name, context in (("a", 1024), ("b", 2048)):
        found = rendered(charted(evidence(context=context), tmp_path / name))
        pod = of_kind(found, "Deployment", "demo-awq-gateway")["spec"]["template"]
        sums.append(pod["metadata"]["annotations"]["checksum/config"])
    assert len(set(sums)) == 2


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"replica": 2}, "replica"),
        ({"replicas": 0}, "replicas"),
        ({"gateway": {"image": "registry.example/gateway:latest"}}, "gateway"),
        ({"image": {"digest": "sha256:" + "cd" * 32}}, "digest"),
    ],
)
def test_a_wrong_value_is_refused_by_the_schema(tmp_path: Path, values: Object, told: str) -> None:
    folder = charted(evidence(), tmp_path / "chart")
    with pytest.raises(HelmError, match=told):
        rendered(folder, values)


def test_an_unknown_gateway_must_be_named(tmp_path: Path) -> None:
    write_bundle(evidence(), image_record(), tmp_path / "chart", form="helm")
    with pytest.raises(HelmError, match="image"):
        rendered(tmp_path / "chart")
    found = rendered(tmp_path / "chart", {"gateway": {"image": GATEWAY}})
    containers = of_kind(found, "Deployment", "demo-awq-gateway")["spec"]["template"]["spec"]["containers"]
    assert {each["image"] for each in containers} == {GATEWAY}


def test_what_prometheus_fills_in_is_left_to_it(tmp_path: Path) -> None:
    found = rendered(charted(evidence(), tmp_path / "chart"), EVERYTHING)
    (rules,) = [each for each in found if each["kind"] == "PrometheusRule"]
    written(evidence(), tmp_path / "bundle")
    expected = yaml.safe_load((tmp_path / "bundle/monitoring/prometheusrule.yaml").read_text())
    assert rules["spec"] == expected["spec"]
