"""What is signed in a container registry, the ways to tamper with it, and what verifiers must say of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from certificates import Signers

from containers.image import referrers
from containers.image.distribution import Registry
from containers.image.oci import INDEX
from pipeline.publishing.attest import CONTENT, PREDICATE_TYPE, StatedRelease, attach
from registry.attestation import CYCLONEDX, SIGNED, VERDICTS, statement
from registry.provenance import PREDICATE as PROVENANCE
from registry.signing import SigningKey, load_or_create_key
from registry.sigstore_bundle import MEDIA_TYPE, sign_statement

REQUIRED = (SIGNED, PROVENANCE, CYCLONEDX, VERDICTS)
"""The statements that everything signed has."""


@dataclass(frozen=True)
class SignedManifest:
    """A manifest in a registry that keeps its files in ``folder``, signed with ``key``; ``about`` says what it is."""

    registry: Registry
    folder: Path
    repository: str
    digest: str
    about: str
    release: StatedRelease
    key: SigningKey

    @property
    def reference(self) -> str:
        """``HOST/NAME@sha256:…``."""
        return f"{self.registry.host}/{self.repository}@{self.digest}"

    def attached(self) -> Iterator[tuple[str, bytes]]:
        """The bundles that are attached, each with the type of its predicate."""
        for each in referrers.referrers(self.registry, self.repository, self.digest):
            if each.kind == MEDIA_TYPE:
                data = referrers.document(self.registry, self.repository, each)
                yield each.annotations[PREDICATE_TYPE], data

    def keep(self, wanted: Callable[[str], bool]) -> None:
        """Take bundles out of the list of what is attached, except those with a wanted type of predicate."""
        tag = self.digest.replace(":", "-")
        found = self.registry.manifest(self.repository, tag)
        assert found is not None
        entries = [
            entry
            for entry in json.loads(found[0])["manifests"]
            if entry["artifactType"] != MEDIA_TYPE or wanted(entry["annotations"][PREDICATE_TYPE])
        ]
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}
        self.registry.put_manifest(self.repository, tag, json.dumps(index).encode(), INDEX)

    def attach(self, kind: str, bundle: bytes) -> None:
        """Attach a bundle that is announced as this kind."""
        subject = referrers.subject_of(self.registry, self.repository, self.digest)
        notes = {CONTENT: "dsse-envelope", PREDICATE_TYPE: kind}
        referrers.attach(self.registry, self.repository, subject, MEDIA_TYPE, bundle, title="x", annotations=notes)


@dataclass(frozen=True)
class Expected:
    """What must be said of a tampered manifest: by ``slipway verify``, and by a verifier that knows nothing of it.

    ``policy`` is the file that the first is given, if any; the rest is what the other one is to trust.
    """

    ours: str
    theirs: str
    policy: Path | None = None
    keys: Sequence[bytes] | None = None
    authorities: Sequence[bytes] = field(default=())
    maximum_scan_age_days: float = 36_500


Tamper = Callable[[SignedManifest, Path], Expected]


def _layer(signed: SignedManifest, _: Path) -> Expected:
    found = signed.registry.manifest(signed.repository, signed.digest)
    assert found is not None
    layers = [layer["digest"].removeprefix("sha256:") for layer in json.loads(found[0])["layers"]]
    name = layers[-2]
    (path,) = signed.folder.glob(f"blobs/docker/registry/v2/blobs/sha256/{name[:2]}/{name}/data")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return Expected(f"sha256:{name}: changed", f"sha256:{name}: has the digest")


def _another_images_signature(signed: SignedManifest, _: Path) -> Expected:
    other = f"sha256:{'0' * 64}"
    signed.keep(lambda kind: kind != SIGNED)
    signed.attach(SIGNED, sign_statement(statement(other, "other", SIGNED, {}), signed.key))
    return Expected(f"signature: it is of another image or artifact, {other}", f"{SIGNED}: is of {other}")


def _expired_certificate(signed: SignedManifest, folder: Path) -> Expected:
    signers = Signers(folder)
    (folder / "middle.pem").write_bytes(signers.authority)
    signers.policy(trusted="middle.pem")
    signed.keep(lambda _: False)
    key = signers.signer(days=(-4, -1))
    attach(signed.registry, signed.repository, signed.digest, signed.release, signed.about, key)
    return Expected(
        "signature: the certificate of release@example.com expired on",
        f"{SIGNED}: CERTIFICATE_ERROR: expired",
        policy=folder / "policy.toml",
        authorities=[signers.authority],
    )


def _removed_referrer(signed: SignedManifest, _: Path) -> Expected:
    signed.keep(lambda kind: kind != VERDICTS)
    return Expected("verdicts: none is attached", f"{VERDICTS}: none that verifies")


def _revoked_key(signed: SignedManifest, folder: Path) -> Expected:
    other = load_or_create_key(folder / "next.pem")
    (folder / "former.pub").write_bytes(signed.key.public.pem())
    (folder / "policy.toml").write_text('[signers]\nkeys = ["next.pub"]\nrevoked = ["former.pub"]\n')
    return Expected(
        f"signature: signed by key {signed.key.public.keyid[:12]}, which is revoked",
        f"{SIGNED}: SIGNATURE_ERROR",
        policy=folder / "policy.toml",
        keys=[other.public.pem()],
    )


def _unsigned(signed: SignedManifest, _: Path) -> Expected:
    signed.keep(lambda _: False)
    return Expected("signature: none is attached: it was never signed, or was removed", f"{SIGNED}: none that verifies")


def _wrong_predicate(signed: SignedManifest, _: Path) -> Expected:
    provenance = next(bundle for kind, bundle in signed.attached() if kind == PROVENANCE)
    signed.keep(lambda kind: kind != SIGNED)
    signed.attach(SIGNED, provenance)
    return Expected(f"signature: it is announced as `{SIGNED}` and is a `{PROVENANCE}`", f"{SIGNED}: is a {PROVENANCE}")


def _stale_scan(signed: SignedManifest, folder: Path) -> Expected:
    (folder / "release.pub").write_bytes(signed.key.public.pem())
    days = 1e-6
    (folder / "policy.toml").write_text(
        f'[signers]\nkeys = ["release.pub"]\n[evidence]\nmaximum_scan_age_days = {days}\n'
    )
    return Expected("scan: expired:", f"{VERDICTS}: scanned", policy=folder / "policy.toml", maximum_scan_age_days=days)


def _changed_statement(signed: SignedManifest, _: Path) -> Expected:
    forged = json.loads(sign_statement(statement(signed.digest, "x", SIGNED, {"by": "me"}), signed.key))
    of_another = next(bundle for kind, bundle in signed.attached() if kind == VERDICTS)
    forged["dsseEnvelope"]["signatures"] = json.loads(of_another)["dsseEnvelope"]["signatures"]
    signed.keep(lambda kind: kind != SIGNED)
    signed.attach(SIGNED, json.dumps(forged).encode())
    return Expected("is not over this statement: one of the two was altered", f"{SIGNED}: SIGNATURE_ERROR")


TAMPERED: Mapping[str, Tamper] = {
    "a layer changed": _layer,
    "another image's signature": _another_images_signature,
    "an expired certificate": _expired_certificate,
    "a removed referrer": _removed_referrer,
    "a revoked key": _revoked_key,
    "nothing signed": _unsigned,
    "a wrong predicate": _wrong_predicate,
    "a stale scan": _stale_scan,
    "a changed statement": _changed_statement,
}
