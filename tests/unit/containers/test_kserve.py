"""The engine as a service of KServe's, with llm-d and without: the pod that the bundle's own Deployment has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from bundle_evidence import DIGEST, GATEWAY, cluster, engine_container, evidence, on_four_gpus, on_gpu, written
from image_record import ARGUMENTS, ENTRY_POINT, image_record

from containers.errors import ContainerError
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


def llm_service(given: BundleEvidence, folder: Path) -> dict[str, Any]:
    write_bundle(given, image_record(), folder, cluster=cluster(), form="llm-d")
    account, found = yaml.safe_load_all((folder / "llminferenceservice.yaml").read_text())
    assert account["metadata"]["name"] == found["spec"]["template"]["serviceAccountName"]
    return dict(found["spec"])


def test_llm_d_runs_the_pod_that_was_tested_by_the_images_own_entry_point(
    given: BundleEvidence, tmp_path: Path
) -> None:
    service = llm_service(given, tmp_path / "llm-d")
    written(given, tmp_path / "bundle", cluster())
    (container,) = service["template"]["containers"]
    expected = {**engine_container(tmp_path / "bundle"), "name": "main", "command": ENTRY_POINT}
    assert container == {"args": ARGUMENTS, **expected}
    assert service["model"] == {"uri": f"oci://registry.example/demo@{DIGEST}", "name": "demo"}
    assert service["storageInitializer"] == {"enabled": False}


def test_llm_d_divides_a_model_among_four_gpus(tmp_path: Path) -> None:
    (container,) = llm_service(on_four_gpus(), tmp_path / "llm-d")["template"]["containers"]
    assert container["args"] == ["--model", "/model", "--tensor-parallel-size", "4"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"


def test_llm_ds_pods_keep_the_labels_that_kserve_selects_them_by(given: BundleEvidence, tmp_path: Path) -> None:
    """KServe's `singleNodeLabels`: a label of the service's that replaced one would make its Deployment invalid."""
    service = llm_service(given, tmp_path / "llm-d")
    kserves = {"app.kubernetes.io/name", "app.kubernetes.io/component", "app.kubernetes.io/part-of"}
    assert not kserves & service["labels"].keys()
    (spread,) = service["template"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"].items() <= service["labels"].items()


def test_a_record_without_an_entry_point_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="names no entry point"):
        write_bundle(evidence(), image_record(configuration="{}"), tmp_path / "llm-d", form="llm-d")
    assert not (tmp_path / "llm-d").exists()
