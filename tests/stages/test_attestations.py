"""What is attached to an image in a real registry, and what verifiers that know nothing of Slipway make of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sigstore_verifiers import NpmVerifier, openssl_verifies

from containers.image import referrers
from containers.image.blobs import BlobStore
from containers.image.build import model_layers, push_layers
from containers.image.distribution import Registry
from containers.image.oci import OciImage
from pipeline.publishing.attest import PREDICATE_TYPE
from pipeline.stages import promotion
from pipeline.stages.run import run
from pipeline.stages.table import RELEASE
from registry.attestation import CYCLONEDX, SIGNED, VERDICTS, Verdicts
from registry.manifest import MANIFEST, Manifest
from registry.provenance import PREDICATE as PROVENANCE
from registry.sigstore_bundle import MEDIA_TYPE
from stages.loopback_registry import serving
from unit.pipeline.release_evidence import Made, settings_of


@dataclass(frozen=True)
class Pushed:
    """A release whose image is in a registry."""

    made: Made
    address: str
    repository: str
    image: OciImage

    def bundles(self) -> dict[str, list[bytes]]:
        """The bundles that are attached to the image, by type of predicate."""
        found: dict[str, list[bytes]] = {}
        with Registry(self.address) as registry:
            for each in referrers.referrers(registry, self.repository, self.image.digest):
                if each.kind == MEDIA_TYPE:
                    data = referrers.document(registry, self.repository, each)
                    found.setdefault(each.annotations[PREDICATE_TYPE], []).append(data)
        return found


@pytest.fixture(scope="module")
def npm(tmp_path_factory: pytest.TempPathFactory) -> NpmVerifier:
    return NpmVerifier.installed(tmp_path_factory.mktemp("npm"))


@pytest.fixture
def pushed(tmp_path: Path) -> Iterator[Pushed]:
    """A champion, whose small image was pushed to Debian's registry."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"packed")
    (checkpoint / "config.json").write_text("{}")
    repository = "slipway/demo-gptq"
    with serving(tmp_path / "registry") as address:
        with Registry(address) as registry:
            blobs = push_layers(registry, repository, (), model_layers(checkpoint, {}), BlobStore(tmp_path / "images"))
            image = OciImage({"Labels": {}}, tuple(blobs), tuple("model" for _ in blobs), {})
            registry.put_blob(repository, image.config)
            registry.put_manifest(repository, "1", image.manifest)
        reference = f"{address}/{repository}@{image.digest}"
        record = {"reference": reference, "digest": image.digest, "pushed": True}
        made = Made(settings_of(tmp_path / "home"), image=record)
        promotion.promote(made.context, run(RELEASE, made.context, made.artifacts()))
        yield Pushed(made, address, repository, image)


def test_independent_verifiers_accept_what_is_attached(pushed: Pushed, npm: NpmVerifier, tmp_path: Path) -> None:
    key = pushed.made.settings.signing_key.with_suffix(".pub")
    bundles = pushed.bundles()
    counts = {kind: len(found) for kind, found in bundles.items()}
    assert counts == {SIGNED: 1, PROVENANCE: 1, CYCLONEDX: 2, VERDICTS: 1}
    for kind, found in bundles.items():
        for bundle in found:
            statement = npm.statement(bundle, key)
            assert statement["predicateType"] == kind
            assert statement["subject"][0]["digest"] == {"sha256": pushed.image.digest.removeprefix("sha256:")}
            assert openssl_verifies(bundle, key, tmp_path)
    release = run(RELEASE, pushed.made.context, pushed.made.artifacts())
    verdicts = Verdicts.model_validate(npm.statement(bundles[VERDICTS][0], key)["predicate"])
    assert verdicts.manifest_digest == Manifest.parse((release.folder / MANIFEST).read_bytes()).digest
    assert (verdicts.passed, set(verdicts.gates)) == (True, {"drift", "scan", "load"})


def test_what_is_attached_is_not_written_again(pushed: Pushed) -> None:
    before = pushed.bundles()
    release = run(RELEASE, pushed.made.context, pushed.made.artifacts())
    pushed.made.told.clear()
    assert promotion.already_promoted(pushed.made.context, release) is not None
    assert pushed.bundles() == before
    assert not [line for line in pushed.made.told if "attached" in line]
