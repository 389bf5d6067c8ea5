"""A signed release in a real container registry, as Slipway and verifiers that know nothing of it see it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from certificates import Signers
from click.testing import CliRunner, Result
from sigstore_verifiers import NpmVerifier, RefusedError, openssl_verifies

from containers.image import referrers
from containers.image.blobs import BlobStore
from containers.image.build import model_layers, push_layers
from containers.image.distribution import Registry, parse
from containers.image.oci import INDEX, OciImage
from containers.scan.evidence import Vulnerability
from pipeline.cli import main
from pipeline.operations import rescan as rescans
from pipeline.publishing.attest import ARTIFACT, CONTENT, IMAGE, PREDICATE_TYPE, VOLUME, StatedRelease, attach, attest
from pipeline.stages import promotion
from pipeline.stages.run import run
from pipeline.stages.table import RELEASE
from pipeline.store.artifacts import Artifact
from pipeline.trust import signing_key, trust_of
from registry.attestation import CYCLONEDX, OPENVEX, SIGNED, VERDICTS, Verdicts, statement
from registry.manifest import MANIFEST, Manifest
from registry.provenance import PREDICATE as PROVENANCE
from registry.signing import SigningKey, load_or_create_key
from registry.sigstore_bundle import MEDIA_TYPE, sign_statement
from registry.verify import verify
from stages.loopback_registry import serving
from stages.referrers_api import with_referrers_api
from unit.pipeline.release_evidence import SCAN, Made, settings_of

DOCS = Path(__file__).parents[2] / "docs"
REPOSITORY = "slipway/demo-gptq"
REQUIRED = (SIGNED, PROVENANCE, CYCLONEDX, VERDICTS)


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
            layers = model_layers(checkpoint, {})
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
    """A registry of its own, with a copy of what the champion's has; and what both sides say of it."""

    champion: Champion
    registry: Registry
    folder: Path
    npm: NpmVerifier

    def reference(self, about: str = IMAGE) -> str:
        """``HOST/NAME@sha256:…`` of something that is signed."""
        return f"{self.registry.host}/{REPOSITORY}@{self.champion.signed[about]}"

    def slipway(self, *words: str, **variables: str) -> Result:
        """Run the command in the champion's home."""
        environment = {"SLIPWAY_HOME": str(self.champion.made.settings.home), **variables}
        return CliRunner().invoke(main, list(words), env=environment, catch_exceptions=False)

    def release(self) -> StatedRelease:
        """The champion's release, verified."""
        return StatedRelease.read(self.champion.release.folder, trust_of(self.champion.made.settings))

    def attached(self, about: str = IMAGE) -> dict[str, bytes]:
        """The bundles that are attached, by the digest of what attaches them."""
        found = referrers.referrers(self.registry, REPOSITORY, self.champion.signed[about])
        return {
            each.digest: referrers.document(self.registry, REPOSITORY, each)
            for each in found
            if each.kind == MEDIA_TYPE
        }

    def keep(self, wanted: Callable[[referrers.Referrer], bool]) -> None:
        """Take out of the list of what is attached to the image all that is not wanted."""
        tag = self.champion.signed[IMAGE].replace(":", "-")
        found = self.registry.manifest(REPOSITORY, tag)
        assert found is not None
        entries = [
            entry
            for entry in json.loads(found[0])["manifests"]
            if wanted(referrers.Referrer(entry["digest"], entry["artifactType"], entry.get("annotations", {})))
        ]
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}
        self.registry.put_manifest(REPOSITORY, tag, json.dumps(index).encode(), INDEX)

    def attach(self, kind: str, bundle: bytes) -> None:
        """Attach a bundle to the image, announced as this kind."""
        subject = referrers.subject_of(self.registry, REPOSITORY, self.champion.signed[IMAGE])
        notes = {CONTENT: "dsse-envelope", PREDICATE_TYPE: kind}
        referrers.attach(self.registry, REPOSITORY, subject, MEDIA_TYPE, bundle, title="x", annotations=notes)


@pytest.fixture
def copied(champion: Champion, npm: NpmVerifier, tmp_path: Path) -> Iterator[Copy]:
    shutil.copytree(champion.folder, tmp_path / "registry")
    with serving(tmp_path / "registry") as address, Registry(address) as registry:
        yield Copy(champion, registry, tmp_path / "registry", npm)


@pytest.mark.parametrize("about", [IMAGE, ARTIFACT, VOLUME])
def test_all_verifiers_accept_what_is_signed(copied: Copy, about: str, tmp_path: Path) -> None:
    champion, reference = copied.champion, copied.reference(about)
    found = copied.npm.verify(reference, [champion.key.read_bytes()], REQUIRED)
    counts = {SIGNED: 1, PROVENANCE: 1, VERDICTS: 1, CYCLONEDX: 2 if about == IMAGE else 1}
    assert {kind: len(predicates) for kind, predicates in found.items()} == counts
    assert all(openssl_verifies(bundle, champion.key, tmp_path) for bundle in copied.attached(about).values())
    schema = json.loads((DOCS / "schemas" / "verdicts.schema.json").read_text())
    jsonschema_rs.validator_for(schema).validate(found[VERDICTS][0])
    verdicts = Verdicts.model_validate(found[VERDICTS][0])
    manifest = Manifest.parse((champion.release.folder / MANIFEST).read_bytes())
    assert (verdicts.manifest_digest, verdicts.image_digest) == (manifest.digest, champion.signed[IMAGE])
    assert (verdicts.passed, set(verdicts.gates)) == (True, {"drift", "scan", "load"})
    done = copied.slipway("verify", f"oci://{reference}", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["verified"], document["manifest_digest"]) == (True, manifest.digest)


def test_what_is_attached_is_not_written_again_and_nothing_else_changes(copied: Copy) -> None:
    settings = copied.champion.made.settings
    before = {path: path.stat().st_mtime_ns for path in copied.folder.rglob("*")}
    told: list[str] = []
    place = f"{copied.registry.host}/{REPOSITORY}"
    attest(copied.release(), signing_key(settings), told.append, place=place)
    assert {path: path.stat().st_mtime_ns for path in copied.folder.rglob("*")} == before
    assert told == []


def test_a_registry_with_the_referrers_api_lists_what_is_attached_itself(copied: Copy) -> None:
    champion = copied.champion
    with with_referrers_api(copied.registry.host) as address, Registry(address) as registry:
        told: list[str] = []
        copied.keep(lambda _: False)
        attest(copied.release(), signing_key(champion.made.settings), told.append, place=f"{address}/{REPOSITORY}")
        attest(copied.release(), signing_key(champion.made.settings), told.append, place=f"{address}/{REPOSITORY}")
        assert len(told) == len(champion.signed)  # the second time nothing was new
        through = replace(copied, registry=registry)
        assert copied.npm.verify(through.reference(), [champion.key.read_bytes()], REQUIRED)
        assert copied.slipway("verify", f"oci://{through.reference()}").exit_code == 0
    assert copied.slipway("verify", f"oci://{copied.reference()}").exit_code == 1  # the fallback's list is empty


def test_a_new_key_adds_its_signatures_and_the_old_one_can_be_revoked(copied: Copy, tmp_path: Path) -> None:
    """`slipway push` after a change of the key, as `docs/how-to/sign-and-trust.md` has it."""
    champion, new = copied.champion, stranger(tmp_path)
    (tmp_path / "both").mkdir()
    for name in (champion.key, tmp_path / "stranger.pub"):
        shutil.copy(name, tmp_path / "both" / name.name)
    rotated = {
        "SLIPWAY_SIGNING_KEY": str(tmp_path / "stranger.pem"),
        "SLIPWAY_TRUSTED_KEYS": str(tmp_path / "both"),
    }
    before = set(copied.attached())
    for added in (len(REQUIRED) + 1, 0):
        done = copied.slipway("push", "demo-gptq", f"{copied.registry.host}/slipway", "--json", **rotated)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)[IMAGE] == copied.reference()
        assert len(set(copied.attached()) - before) == added
        before = set(copied.attached())
    (tmp_path / "policy.toml").write_text('[signers]\nkeys = ["both"]\nrevoked = ["both/release.pub"]\n')
    done = copied.slipway(
        "verify", f"oci://{copied.reference()}", "--json", SLIPWAY_POLICY=str(tmp_path / "policy.toml")
    )
    assert (done.exit_code, json.loads(done.stdout)["signer"]) == (0, new.public.keyid)
    assert copied.npm.verify(copied.reference(), [new.public.pem()], REQUIRED)


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


def stranger(folder: Path) -> SigningKey:
    return load_or_create_key(folder / "stranger.pem")


def tampered_layer(copied: Copy, _: Path) -> dict[str, Any]:
    layer = copied.release().image.layers[0].digest.removeprefix("sha256:")
    (path,) = copied.folder.glob(f"blobs/docker/registry/v2/blobs/sha256/{layer[:2]}/{layer}/data")
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    return {"why": f"sha256:{layer}: changed", "theirs": f"sha256:{layer}: has the digest"}


def another_images_signature(copied: Copy, _: Path) -> dict[str, Any]:
    copied.keep(lambda each: each.annotations.get(PREDICATE_TYPE) != SIGNED)
    other = f"sha256:{'0' * 64}"
    copied.attach(
        SIGNED, sign_statement(statement(other, "other", SIGNED, {}), signing_key(copied.champion.made.settings))
    )
    return {"why": f"signature: it is of another image or artifact, {other}", "theirs": f"{SIGNED}: is of {other}"}


def expired_certificate(copied: Copy, folder: Path) -> dict[str, Any]:
    signers = Signers(folder)
    (folder / "middle.pem").write_bytes(signers.authority)
    signers.policy(trusted="middle.pem")
    copied.keep(lambda each: each.kind != MEDIA_TYPE)
    release = copied.release()
    attach(
        copied.registry, REPOSITORY, copied.champion.signed[IMAGE], release, IMAGE,
        signers.signer(days=(-4, -1)),
    )  # fmt: skip
    return {
        "why": "signature: the certificate of release@example.com expired on",
        "theirs": f"{SIGNED}: CERTIFICATE_ERROR: expired",
        "policy": folder / "policy.toml",
        "authorities": [signers.authority],
    }


def removed_referrer(copied: Copy, _: Path) -> dict[str, Any]:
    copied.keep(lambda each: each.annotations.get(PREDICATE_TYPE) != VERDICTS)
    return {"why": "verdicts: none is attached", "theirs": f"{VERDICTS}: none that verifies"}


def revoked_key(copied: Copy, folder: Path) -> dict[str, Any]:
    other = stranger(folder)
    shutil.copy(copied.champion.key, folder / "release.pub")
    (folder / "policy.toml").write_text('[signers]\nkeys = ["stranger.pub"]\nrevoked = ["release.pub"]\n')
    keyid = signing_key(copied.champion.made.settings).public.keyid
    return {
        "why": f"signature: signed by key {keyid[:12]}, which is revoked",
        "theirs": f"{SIGNED}: SIGNATURE_ERROR",
        "policy": folder / "policy.toml",
        "keys": [other.public.pem()],
    }


def unsigned(copied: Copy, _: Path) -> dict[str, Any]:
    copied.keep(lambda each: each.kind != MEDIA_TYPE)
    return {
        "why": "signature: none is attached: it was never signed, or was removed",
        "theirs": f"{SIGNED}: none that verifies",
    }


def wrong_predicate(copied: Copy, _: Path) -> dict[str, Any]:
    copied.keep(lambda each: each.annotations.get(PREDICATE_TYPE) != SIGNED)
    (provenance,) = (
        referrers.document(copied.registry, REPOSITORY, each)
        for each in referrers.referrers(copied.registry, REPOSITORY, copied.champion.signed[IMAGE])
        if each.annotations.get(PREDICATE_TYPE) == PROVENANCE
    )
    copied.attach(SIGNED, provenance)
    return {
        "why": f"signature: it is announced as `{SIGNED}` and is a `{PROVENANCE}`",
        "theirs": f"{SIGNED}: is a {PROVENANCE}",
    }


def stale_scan(copied: Copy, folder: Path) -> dict[str, Any]:
    shutil.copy(copied.champion.key, folder / "release.pub")
    (folder / "policy.toml").write_text(
        '[signers]\nkeys = ["release.pub"]\n[evidence]\nmaximum_scan_age_days = 0.0001\n'
    )
    return {
        "why": "scan: expired:",
        "theirs": f"{VERDICTS}: scanned",
        "policy": folder / "policy.toml",
        "maximum_scan_age_days": 0.0001,
    }


def changed_statement(copied: Copy, _: Path) -> dict[str, Any]:
    document = json.loads(next(iter(copied.attached().values())))
    settings = copied.champion.made.settings
    forged = json.loads(
        sign_statement(statement(copied.champion.signed[IMAGE], "x", SIGNED, {"by": "me"}), signing_key(settings))
    )
    forged["dsseEnvelope"]["signatures"] = document["dsseEnvelope"]["signatures"]
    copied.keep(lambda each: each.annotations.get(PREDICATE_TYPE) != SIGNED)
    copied.attach(SIGNED, json.dumps(forged).encode())
    return {"why": "is not over this statement: one of the two was altered", "theirs": f"{SIGNED}: SIGNATURE_ERROR"}


@pytest.mark.parametrize(
    "tamper",
    [
        tampered_layer, another_images_signature, expired_certificate, removed_referrer, revoked_key, unsigned,
        wrong_predicate, stale_scan, changed_statement,
    ],
)  # fmt: skip
def test_all_verifiers_refuse_and_name_the_cause(
    copied: Copy, tmp_path: Path, tamper: Callable[[Copy, Path], dict[str, Any]]
) -> None:
    trusted = tmp_path / "trusted"
    trusted.mkdir()
    told = tamper(copied, trusted)
    variables = {"SLIPWAY_POLICY": str(told["policy"])} if "policy" in told else {}
    done = copied.slipway("verify", f"oci://{copied.reference()}", "--json", **variables)
    assert done.exit_code == 1, done.output
    problems = [f"{each['name']}: {each['why']}" for each in json.loads(done.stdout)["problems"]]
    assert any(told["why"] in problem for problem in problems), problems
    keys = told.get("keys", [copied.champion.key.read_bytes()])
    with pytest.raises(RefusedError) as refused:
        copied.npm.verify(
            copied.reference(), keys, REQUIRED, authorities=told.get("authorities", ()),
            maximum_scan_age_days=told.get("maximum_scan_age_days", 36_500),
        )  # fmt: skip
    assert told["theirs"] in str(refused.value)


@pytest.mark.parametrize("about", [ARTIFACT, VOLUME])
def test_the_weights_are_pulled_and_verified_without_the_runtime(copied: Copy, tmp_path: Path, about: str) -> None:
    folder = tmp_path / "pulled"
    done = copied.slipway("pull", f"oci://{copied.reference(about)}", str(folder))
    assert done.exit_code == 0, done.output
    assert verify(folder, trust_of(copied.champion.made.settings)).manifest.name == "demo-gptq"
    assert (folder / "model.safetensors").read_bytes() == b"packed"
