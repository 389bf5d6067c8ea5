"""A signed release in a real container registry, as Slipway and verifiers that know nothing of it see it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import jsonschema_rs
import pytest
from click.testing import CliRunner, Result
from signed_registry import REQUIRED, TAMPERED, SignedManifest, Tamper
from sigstore_verifiers import NpmVerifier, RefusedError, openssl_verifies

from containers.image import referrers
from containers.image.blobs import BlobStore
from containers.image.build import push_layers, release_layers
from containers.image.distribution import Registry, parse
from containers.image.oci import OciImage
from containers.scan.evidence import Vulnerability
from pipeline.cli import main
from pipeline.operations import rescan as rescans
from pipeline.publishing.attest import ARTIFACT, IMAGE, PREDICATE_TYPE, VOLUME, StatedRelease, attest
from pipeline.stages import promotion
from pipeline.stages.run import run
from pipeline.stages.table import RELEASE
from pipeline.store.artifacts import Artifact
from pipeline.trust import signing_key, trust_of
from registry.attestation import CYCLONEDX, OPENVEX, SIGNED, VERDICTS, Verdicts
from registry.manifest import MANIFEST, Manifest
from registry.provenance import PREDICATE as PROVENANCE
from registry.signing import load_or_create_key
from registry.verify import verify
from stages.loopback_registry import serving
from stages.referrers_api import with_referrers_api
from unit.pipeline.release_evidence import SCAN, Made, settings_of

DOCS = Path(__file__).parents[2] / "docs"
REPOSITORY = "slipway/demo-gptq"


@dataclass(frozen=True)
class Champion:
    """A champion that was pushed: its release, the registry's folder, and the digests of what is signed."""

    made: Made
    release: Artifact
    folder: Path
    image: str
    signed: dict[str, str]

    @property
    def key(self) -> Path:
        """The public key."""
        return self.made.settings.signing_key.with_suffix(".pub")


@pytest.fixture(scope="module")
def npm(tmp_path_factory: pytest.TempPathFactory) -> NpmVerifier:
    return NpmVerifier.installed(tmp_path_factory.mktemp("npm"))


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Champion:
    """A champion, whose small image was pushed to Debian's registry, and signed there when it was promoted."""
    folder = tmp_path_factory.mktemp("attestations")
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"packed")
    (checkpoint / "config.json").write_text("{}")
    with serving(folder / "registry") as address:
        with Registry(address) as registry:
            layers = release_layers(checkpoint, {}, ())
            blobs = push_layers(registry, REPOSITORY, (), layers, BlobStore(folder / "images"))
            image = OciImage({"Labels": {}}, tuple(blobs), tuple("model" for _ in blobs), {})
            registry.put_blob(REPOSITORY, image.config)
            registry.put_manifest(REPOSITORY, "1", image.manifest)
        record = {
            "reference": f"{address}/{REPOSITORY}@{image.digest}", "digest": image.digest, "pushed": True,
            "manifest": image.manifest.decode(), "configuration": image.config.decode(),
            "layers": [
                {"digest": blob.digest, "size": blob.size, "holds": layer.members[0].name.replace("/", " ", 1)}
                for blob, layer in zip(blobs, layers, strict=True)
            ],
        }  # fmt: skip
        made = Made(settings_of(folder / "home"), image=record)
        release = run(RELEASE, made.context, made.artifacts())
        promoted = promotion.promote(made.context, release).version
        references = {IMAGE: promoted.image, **promoted.weights}
        signed = {about: parse(reference)[2] for about, reference in references.items()}
        assert set(signed) == {IMAGE, ARTIFACT, VOLUME}
    return Champion(made, release, folder / "registry", promoted.image, signed)


@dataclass(frozen=True)
class Copy:
    """A registry of its own, with a copy of what the champion's has, and the command in the champion's home."""

    champion: Champion
    registry: Registry
    folder: Path

    def signed(self, about: str = IMAGE) -> SignedManifest:
        """What is signed in this registry."""
        release = StatedRelease.read(self.champion.release.folder, trust_of(self.champion.made.settings))
        digest, key = self.champion.signed[about], signing_key(self.champion.made.settings)
        return SignedManifest(self.registry, self.folder, REPOSITORY, digest, about, release, key)

    def slipway(self, *words: str, **variables: str) -> Result:
        """Run the command in the champion's home."""
        environment = {"SLIPWAY_HOME": str(self.champion.made.settings.home), **variables}
        return CliRunner().invoke(main, list(words), env=environment, catch_exceptions=False)


@pytest.fixture
def copied(champion: Champion, tmp_path: Path) -> Iterator[Copy]:
    shutil.copytree(champion.folder, tmp_path / "registry")
    with serving(tmp_path / "registry") as address, Registry(address) as registry:
        yield Copy(champion, registry, tmp_path / "registry")


@pytest.mark.parametrize("about", [IMAGE, ARTIFACT, VOLUME])
def test_all_verifiers_accept_what_is_signed(copied: Copy, npm: NpmVerifier, about: str, tmp_path: Path) -> None:
    champion, signed = copied.champion, copied.signed(about)
    found = npm.verify(signed.reference, [champion.key.read_bytes()], REQUIRED)
    counts = {SIGNED: 1, PROVENANCE: 1, VERDICTS: 1, CYCLONEDX: 2 if about == IMAGE else 1}
    assert {kind: len(predicates) for kind, predicates in found.items()} == counts
    assert all(openssl_verifies(bundle, champion.key, tmp_path) for _, bundle in signed.attached())
    schema = json.loads((DOCS / "schemas" / "verdicts.schema.json").read_text())
    jsonschema_rs.validator_for(schema).validate(found[VERDICTS][0])
    verdicts = Verdicts.model_validate(found[VERDICTS][0])
    manifest = Manifest.parse((champion.release.folder / MANIFEST).read_bytes())
    assert (verdicts.manifest_digest, verdicts.image_digest) == (manifest.digest, champion.signed[IMAGE])
    assert (verdicts.passed, set(verdicts.gates)) == (True, {"drift", "scan", "load"})
    done = copied.slipway("verify", f"oci://{signed.reference}", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["verified"], document["manifest_digest"]) == (True, manifest.digest)


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_all_verifiers_refuse_and_name_the_cause(
    copied: Copy, npm: NpmVerifier, tmp_path: Path, tamper: Tamper
) -> None:
    (tmp_path / "trusted").mkdir()
    signed = copied.signed()
    expected = tamper(signed, tmp_path / "trusted")
    variables = {} if expected.policy is None else {"SLIPWAY_POLICY": str(expected.policy)}
    done = copied.slipway("verify", f"oci://{signed.reference}", "--json", **variables)
    assert done.exit_code == 1, done.output
    problems = [f"{each['name']}: {each['why']}" for each in json.loads(done.stdout)["problems"]]
    assert any(expected.ours in problem for problem in problems), problems
    with pytest.raises(RefusedError) as refused:
        npm.verify(
            signed.reference, expected.keys or [copied.champion.key.read_bytes()], REQUIRED,
            authorities=expected.authorities, maximum_scan_age_days=expected.maximum_scan_age_days,
        )  # fmt: skip
    assert expected.theirs in str(refused.value)


def test_what_is_attached_is_not_written_again_and_nothing_else_changes(copied: Copy) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.folder.rglob("*")}
    told: list[str] = []
    signed = copied.signed()
    attest(signed.release, signed.key, told.append, place=f"{copied.registry.host}/{REPOSITORY}")
    assert {path: path.stat().st_mtime_ns for path in copied.folder.rglob("*")} == before
    assert told == []


def test_a_registry_with_the_referrers_api_lists_what_is_attached_itself(copied: Copy, npm: NpmVerifier) -> None:
    signed, told = copied.signed(), list[str]()
    signed.keep(lambda _: False)
    with with_referrers_api(copied.registry.host) as address:
        place = f"{address}/{REPOSITORY}"
        for _ in range(2):
            attest(signed.release, signed.key, told.append, place=place)
        assert len(told) == len(copied.champion.signed)  # the second time nothing was new
        assert npm.verify(f"{place}@{signed.digest}", [copied.champion.key.read_bytes()], REQUIRED)
        assert copied.slipway("verify", f"oci://{place}@{signed.digest}").exit_code == 0
    assert copied.slipway("verify", f"oci://{signed.reference}").exit_code == 1  # the fallback's list is empty


def test_a_new_key_adds_its_signatures_and_the_old_one_can_be_revoked(
    copied: Copy, npm: NpmVerifier, tmp_path: Path
) -> None:
    """`slipway push` after a change of the key, as `docs/how-to/sign-and-trust.md` has it."""
    signed, new = copied.signed(), load_or_create_key(tmp_path / "new.pem")
    (tmp_path / "both").mkdir()
    for name in (copied.champion.key, tmp_path / "new.pub"):
        shutil.copy(name, tmp_path / "both" / name.name)
    rotated = {"SLIPWAY_SIGNING_KEY": str(tmp_path / "new.pem"), "SLIPWAY_TRUSTED_KEYS": str(tmp_path / "both")}
    before = len(list(signed.attached()))
    for added in (before, 0):
        done = copied.slipway("push", "demo-gptq", f"{copied.registry.host}/slipway", "--json", **rotated)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)[IMAGE] == signed.reference
        after = len(list(signed.attached()))
        assert after - before == added
        before = after
    (tmp_path / "policy.toml").write_text('[signers]\nkeys = ["both"]\nrevoked = ["both/release.pub"]\n')
    revoking = {"SLIPWAY_POLICY": str(tmp_path / "policy.toml")}
    done = copied.slipway("verify", f"oci://{signed.reference}", "--json", **revoking)
    assert (done.exit_code, json.loads(done.stdout)["signer"]) == (0, new.public.keyid)
    assert npm.verify(signed.reference, [new.public.pem()], REQUIRED)


def test_an_image_is_pushed_whole_to_another_registry(copied: Copy, tmp_path: Path) -> None:
    with serving(tmp_path / "other") as address:
        done = copied.slipway("push", "demo-gptq", f"{address}/elsewhere", "--json")
        assert done.exit_code == 0, done.output
        found = {about: parse(reference) for about, reference in json.loads(done.stdout).items()}
        assert {about: digest for about, (_, _, digest) in found.items()} == copied.champion.signed
        assert {(host, repository) for host, repository, _ in found.values()} == {(address, "elsewhere/demo-gptq")}
        assert copied.slipway("verify", f"oci://{address}/elsewhere/demo-gptq@{found[VOLUME][2]}").exit_code == 0


def test_a_rescan_states_what_it_found_and_the_latest_counts(
    champion: Champion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, (address, _, digest) = champion.made.settings, parse(champion.image)
    found = Vulnerability(id="CVE-2026-0001", package="zlib", installed="1", severity="CRITICAL", fixed="2")
    scans = [SCAN.model_copy(update={"scanned_at": SCAN.scanned_at + timedelta(days=days)}) for days in (1, 2)]
    scans[0] = scans[0].model_copy(update={"vulnerabilities": (found,), "purl": f"pkg:oci/demo-gptq@{digest}"})
    shutil.copytree(champion.folder, tmp_path / "registry")
    seen = []
    with serving(tmp_path / "registry", int(address.rpartition(":")[2])):
        for scan in scans:
            monkeypatch.setattr(rescans, "scan_release", lambda *_, scan=scan: (scan, "sbom"))
            rescans.rescan(settings, ["demo-gptq"], champion.made.told.append)
            done = CliRunner().invoke(
                main, ["verify", f"oci://{champion.image}", "--json"], env={"SLIPWAY_HOME": str(settings.home)}
            )
            seen.append((done.exit_code, json.loads(done.stdout)))
        with Registry(address) as registry:
            attached = referrers.referrers(registry, REPOSITORY, digest)
    kinds = [each.annotations.get(PREDICATE_TYPE) for each in attached]
    assert (kinds.count(VERDICTS), kinds.count(OPENVEX), kinds.count(SIGNED)) == (3, 1, 1)
    (refused, problems), (accepted, document) = seen
    assert (refused, accepted) == (1, 0)
    assert "CVE-2026-0001 CRITICAL in zlib" in problems["problems"][0]["why"]
    assert document["scanned"] == "2026-11-26T00:00:00Z"


@pytest.mark.parametrize("about", [ARTIFACT, VOLUME])
def test_the_weights_are_pulled_and_verified_without_the_runtime(copied: Copy, tmp_path: Path, about: str) -> None:
    folder = tmp_path / "pulled"
    done = copied.slipway("pull", f"oci://{copied.signed(about).reference}", str(folder))
    assert done.exit_code == 0, done.output
    assert verify(folder, trust_of(copied.champion.made.settings)).manifest.name == "demo-gptq"
    assert (folder / "model.safetensors").read_bytes() == b"packed"
