"""A release's weights as an artifact and as a volume: what is shared with the image, and what a mount has."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from image_record import DIGEST, image_record
from release_folder import make_release

from containers.image.build import ImageRecord, LayerRecord
from containers.image.oci import CONFIG
from containers.image.weights import FILE_PATH, MODEL_ARTIFACT, MODEL_CONFIG, Weights, model_artifact, volume
from registry.digests import digest_of
from registry.manifest import Manifest
from registry.signing import load_or_create_key

HELD = (
    "base debian", "runtime vllm-cpu", "model model.safetensors", "model config.json",
    "adapters tests/adapter_config.json and 1 more", "draft_model config.json and 2 more", "serve chat_template.jinja",
)  # fmt: skip
DOCUMENTS = {"release/manifest.json": b"{}", "release/evidence/scan.json": b"[]"}
SHARED = HELD[2:6]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_release(tmp_path / "release", load_or_create_key(tmp_path / "key.pem"))


def image() -> ImageRecord:
    return image_record(
        layers=[LayerRecord(digest=f"sha256:{number:064}", size=number, holds=held) for number, held in enumerate(HELD)]
    )


def layers(weights: Weights) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(weights.manifest)["layers"]
    return found


def test_both_have_the_images_own_layers_and_one_more(manifest: Manifest) -> None:
    for made in (model_artifact, volume):
        weights = made(image(), manifest, DOCUMENTS)
        digests = [layer["digest"] for layer in layers(weights)]
        assert digests == [f"sha256:{HELD.index(held):064}" for held in SHARED] + [digest_of(weights.layer)]
        assert weights == made(image(), manifest, DOCUMENTS)
        assert weights.tag.startswith(manifest.digest.removeprefix("sha256:")[:12])


def test_the_artifact_is_a_model_pack(manifest: Manifest) -> None:
    weights = model_artifact(image(), manifest, DOCUMENTS)
    document, config = json.loads(weights.manifest), json.loads(weights.config)
    assert (document["artifactType"], document["config"]["mediaType"]) == (MODEL_ARTIFACT, MODEL_CONFIG)
    kinds = [str(layer["mediaType"]).removeprefix("application/vnd.cncf.model.") for layer in layers(weights)]
    assert kinds == ["weight.v1.tar", "weight.config.v1.tar", "weight.v1.tar", "weight.v1.tar", "doc.v1.tar"]
    assert layers(weights)[0]["annotations"] == {FILE_PATH: "model/model.safetensors"}
    assert [("annotations" in layer) for layer in layers(weights)] == [True, True, False, False, False]
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in layers(weights)]}
    assert config["config"]["quantization"] == "awq"


def test_the_volume_is_an_image_that_a_runtime_unpacks(manifest: Manifest) -> None:
    weights = volume(image(), manifest, DOCUMENTS)
    document, config = json.loads(weights.manifest), json.loads(weights.config)
    assert "artifactType" not in document
    assert document["config"]["mediaType"] == CONFIG
    assert {layer["mediaType"] for layer in layers(weights)} == {"application/vnd.oci.image.layer.v1.tar"}
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in layers(weights)]
    with tarfile.open(fileobj=io.BytesIO(weights.layer)) as archive:
        members = {member.name: member for member in archive}
    assert {name for name, member in members.items() if member.isreg()} == {f"model/{name}" for name in DOCUMENTS}
    assert (members["models"].issym(), members["models"].linkname) == (True, "model")
    assert weights.digest != DIGEST
