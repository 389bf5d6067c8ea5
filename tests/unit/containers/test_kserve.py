"""The engine as KServe's InferenceService: the pod that the bundle's own Deployment has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from bundle_evidence import DIGEST, GATEWAY, cluster, engine_container, evidence, on_gpu, written
from image_record import image_record

from containers.kubernetes.bundle import Images, write_bundle
from containers.kubernetes.numbers import BundleEvidence


@pytest.fixture(params=["cpu", "gpu"])
def given(request: pytest.FixtureRequest) -> BundleEvidence:
    return evidence() if request.param == "cpu" else on_gpu()


def service(given: BundleEvidence, folder: Path) -> dict[str, Any]:
    write_bundle(
        given, image_record(), folder, images=Images(gateway=GATEWAY), cluster=cluster(), form="kserve"
    )  # fmt: skip
    assert [path.name for path in folder.iterdir()] == ["inferenceservice.yaml"]
    account, found = yaml.safe_load_all((folder / "inferenceservice.yaml").read_text())
    assert account["metadata"]["name"] == found["spec"]["predictor"]["serviceAccountName"]
    return dict(found)


def test_the_predictor_is_the_pod_that_was_tested(given: BundleEvidence, tmp_path: Path) -> None:
    predictor = service(given, tmp_path / "kserve")["spec"]["predictor"]
    written(given, tmp_path / "bundle", cluster())
    (container,) = predictor["containers"]
    assert container == {**engine_container(tmp_path / "bundle"), "name": "kserve-container"}
    assert container["image"] == f"registry.example/demo@{DIGEST}"


def test_what_is_a_pods_in_it_is_a_valid_pod(given: BundleEvidence, tmp_path: Path) -> None:
    predictor = service(given, tmp_path / "kserve")["spec"]["predictor"]
    ours = {"labels", "minReplicas", "timeout", "deploymentStrategy"}
    spec = {key: value for key, value in predictor.items() if key not in ours}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "labels": predictor["labels"]}, "spec": spec}
    kubernetes_validate.validate(pod, "1.37", strict=True)
    assert (predictor["minReplicas"], predictor["deploymentStrategy"]["type"]) == (2, "RollingUpdate")
