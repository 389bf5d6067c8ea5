"""Signs a release in a container registry, and attaches what is known of it, for tools that know nothing of Slipway.

What is stated is made from the release's signed manifest and its evidence by pure functions, and the same key signs the
same statement with the same bytes, in every registry. So attaching twice writes nothing, and a new key adds its own
statements.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Any

from containers.image import referrers
from containers.image.build import ImageRecord, parse_image
from containers.image.distribution import Registry, parse
from containers.image.weights import Weights, model_artifact, volume
from containers.scan import mlbom, vex_document
from containers.scan.evidence import ScanEvidence, parse_scan
from containers.scan.scan_gate import Waived
from registry import attestation, provenance
from registry.attestation import Scanned, Verdicts
from registry.digests import digest_json, digest_of
from registry.errors import Problem, VerificationError
from registry.manifest import DOCUMENTS, EVIDENCE, MANIFEST, Manifest
from registry.policy import Trust, policy_of
from registry.progress import Progress
from registry.signing import SigningKey
from registry.sigstore_bundle import MEDIA_TYPE, sign_statement
from registry.verdict import Verdict
from registry.verify import check_documents

CONTENT, PREDICATE_TYPE = "dev.sigstore.bundle.content", "dev.sigstore.bundle.predicateType"
"""The annotations by which Sigstore's clients find a bundle."""
CREATED = "org.opencontainers.image.created"
"""The annotation with the time of what a bundle states: of the scan, or when the release was sealed."""
IMAGE, ARTIFACT, VOLUME = "image", "weights", "volume"
"""What of a release is in a container registry: see `containers.image.weights`."""
_SBOM, _MLBOM, _SCAN, _WAIVED, _IMAGE = (
    f"{EVIDENCE}/{name}" for name in ("sbom.cdx.json", "mlbom.cdx.json", "scan.json", "waived.json", "image.json")
)
# What a later scan states anew.
_DATED_BY_SCAN = ("vex", "verdicts")
Stated = tuple[str, Mapping[str, Any]]
"""The type of a predicate, and the predicate."""


@dataclass(frozen=True)
class Rescan:
    """A later scan of a release's image: what it found, what of that is allowed, and the verdict."""

    evidence: ScanEvidence
    waived: Sequence[Waived]
    verdict: Verdict


@dataclass(frozen=True)
class StatedRelease:
    """A release of which something is stated: its manifest, and the verified bytes of its folder ``release/``.

    A ``rescan`` stands in place of the scan in its evidence.
    """

    manifest: Manifest
    documents: Mapping[str, bytes]
    rescan: Rescan | None = None

    @classmethod
    def read(cls, folder: Path, trust: Trust) -> StatedRelease:
        """Read a release's folder, without its weights.

        Raises:
            VerificationError: what is read is not what was signed, or not what is trusted.
        """
        digest = digest_of((folder / MANIFEST).read_bytes())
        manifest = check_documents(folder, policy_of(trust), digest).manifest
        listed = [name for name in manifest.files if name.startswith("release/")]
        found = {name: (folder / name).read_bytes() for name in (*listed, *DOCUMENTS) if (folder / name).exists()}
        changed = [
            name for name in listed if digest_of(found.get(name, b"")) != f"sha256:{manifest.files[name].sha256}"
        ]
        if changed:
            raise VerificationError(folder, [Problem(name, "missing or changed") for name in changed])
        return cls(manifest, found)

    @property
    def image(self) -> ImageRecord:
        """The image's record; ``ImageError`` where it is not valid."""
        return parse_image(self.documents[_IMAGE], _IMAGE)

    @property
    def scan(self) -> ScanEvidence:
        """The latest scan; ``ScanError`` where it is not valid."""
        return self.rescan.evidence if self.rescan else parse_scan(self.documents[_SCAN], _SCAN)

    @property
    def scanned_at(self) -> str:
        """When it was scanned, UTC."""
        return f"{self.scan.scanned_at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"

    @property
    def weights(self) -> dict[str, Weights]:
        """The weights without the runtime, as an artifact and as a volume."""
        arguments = (self.image, self.manifest, self.documents)
        return {ARTIFACT: model_artifact(*arguments), VOLUME: volume(*arguments)}

    @property
    def digests(self) -> dict[str, str]:
        """The digest of each manifest that is signed, by what it is."""
        return {IMAGE: self.manifest.image.digest, **{about: each.digest for about, each in self.weights.items()}}

    def stated(self, about: str) -> dict[str, Stated]:
        """The statements about the image, or about the weights where they are without it, by title."""
        found: dict[str, Stated] = {
            "provenance": (provenance.PREDICATE, json.loads(provenance.statement(self.manifest))["predicate"])
        }
        if _MLBOM in self.documents:
            found["mlbom"] = (attestation.CYCLONEDX, json.loads(self.documents[_MLBOM]))
        if about == IMAGE:
            found["sbom"] = (attestation.CYCLONEDX, json.loads(self.documents[_SBOM]))
            waived = self.rescan.waived if self.rescan else vex_document.read_waived(self.documents[_WAIVED])
            vex = vex_document.document(self.scan, waived, self.scan.purl or self.manifest.image.digest)
            if vex is not None:
                found["vex"] = (attestation.OPENVEX, vex)
        return found

    def verdicts(self, stated: Mapping[str, Stated]) -> Verdicts:
        """The verdicts, which name all else that is ``stated``."""
        gates = {record.verdict.gate: record.verdict for record in self.manifest.gates}
        if self.rescan is not None:
            gates[self.rescan.verdict.gate] = self.rescan.verdict
        return Verdicts(
            release=self.manifest.name,
            manifest_digest=self.manifest.digest,
            image_digest=self.manifest.image.digest,
            sealed=self.manifest.created,
            passed=not any(verdict.blocks for verdict in gates.values()),
            gates=gates,
            scan=Scanned(at=self.scanned_at, database_updated_at=self.scan.database.updated_at),
            statements={title: digest_json(predicate) for title, (_, predicate) in stated.items()},
        )


def attest(release: StatedRelease, key: SigningKey, progress: Progress, *, place: str | None = None) -> dict[str, str]:
    """Sign a release in the registry of its image, and return the references of what is signed, by what it is.

    ``place`` is a repository (``HOST/NAME``) that has the image, if not the one that the release names.

    The weights are pushed first, as an artifact and as a volume; the registry has their layers already. Then each gets
    its statements, and the image its bills of materials unsigned too, for scanners that look for those. Nothing that is
    there is written again.

    Raises:
        DistributionError: the registry can't be reached, or has lost the image.
    """
    host, repository, _ = parse(place or release.manifest.image.reference)
    digest = release.manifest.image.digest
    with Registry(host) as registry:
        subject = referrers.subject_of(registry, repository, digest)
        for title, name in (("sbom", _SBOM), ("mlbom", _MLBOM)):
            if name in release.documents:
                referrers.attach(
                    registry, repository, subject, mlbom.KIND, release.documents[name], title=f"{title}.cdx.json"
                )
        for each in release.weights.values():
            each.push(registry, repository)
        for about, signed in release.digests.items():
            new = attach(registry, repository, signed, release, about, key)
            if new:
                progress(f"attached to the {about} {host}/{repository}@{signed}: {', '.join(new)}")
    return {about: f"{host}/{repository}@{signed}" for about, signed in release.digests.items()}


def attach(
    registry: Registry, repository: str, digest: str, release: StatedRelease, about: str, key: SigningKey
) -> list[str]:
    """Attach what is stated ``about`` a manifest, the verdicts and at last a signature; return what was new."""
    subject, stated = referrers.subject_of(registry, repository, digest), release.stated(about)
    every: dict[str, Stated] = {
        **stated,
        "verdicts": (attestation.VERDICTS, release.verdicts(stated).predicate()),
        "signature": (attestation.SIGNED, {}),
    }
    new: list[str] = []
    for title, (kind, predicate) in every.items():
        payload = attestation.statement(digest, release.manifest.name, kind, predicate)
        attached = referrers.attach(
            registry, repository, subject, MEDIA_TYPE, sign_statement(payload, key, with_chain=False),
            title=f"{title}.sigstore.json",
            annotations={
                CONTENT: "dsse-envelope",
                PREDICATE_TYPE: kind,
                CREATED: release.scanned_at if title in _DATED_BY_SCAN else release.manifest.created,
            },
        )  # fmt: skip
        new += [title] * attached.is_new
    return new
