"""Signs what is in a container registry, and attaches what is known of it, for tools that know nothing of Slipway.

What is stated is made from the release's signed manifest and its evidence by pure functions, and the same key signs the
same statement with the same bytes. So attaching twice writes nothing, and a new key adds its own statements.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from containers.image import referrers
from containers.image.distribution import Registry, parse
from containers.scan import mlbom, vex_document
from containers.scan.evidence import parse_scan
from registry import attestation, provenance
from registry.attestation import Scanned, Verdicts
from registry.digests import digest_json, digest_of
from registry.errors import Problem, VerificationError
from registry.manifest import EVIDENCE, MANIFEST, Manifest
from registry.policy import Trust, policy_of
from registry.progress import Progress
from registry.signing import SigningKey
from registry.sigstore_bundle import MEDIA_TYPE, sign_statement
from registry.verify import check_documents

CONTENT, PREDICATE_TYPE = "dev.sigstore.bundle.content", "dev.sigstore.bundle.predicateType"
"""The annotations by which Sigstore's clients find a bundle."""
_SBOM, _MLBOM, _SCAN, _WAIVED = (
    f"{EVIDENCE}/{name}" for name in ("sbom.cdx.json", "mlbom.cdx.json", "scan.json", "waived.json")
)
EVIDENCE_FILES = (_SBOM, _MLBOM, _SCAN, _WAIVED)
"""The files of a release that statements are made of."""

Stated = tuple[str, Mapping[str, Any]]
"""The type of a predicate, and the predicate."""


@dataclass(frozen=True)
class StatedRelease:
    """A release of which something is stated: its manifest, and the bytes of its `EVIDENCE_FILES`, all verified."""

    manifest: Manifest
    evidence: Mapping[str, bytes]

    @classmethod
    def read(cls, folder: Path, trust: Trust) -> StatedRelease:
        """Read a release's folder, without its weights.

        Raises:
            VerificationError: what is read is not what was signed, or not what is trusted.
        """
        digest = digest_of((folder / MANIFEST).read_bytes())
        manifest = check_documents(folder, policy_of(trust), digest).manifest
        found = {name: (folder / name).read_bytes() for name in EVIDENCE_FILES if name in manifest.files}
        changed = [name for name, data in found.items() if digest_of(data) != f"sha256:{manifest.files[name].sha256}"]
        if changed:
            raise VerificationError(
                folder, [Problem(name, "changed: another sha256 than was signed") for name in changed]
            )
        return cls(manifest, found)

    def about_the_model(self) -> dict[str, Stated]:
        """The statements about the weights, wherever they are, by title."""
        found: dict[str, Stated] = {
            "provenance": (provenance.PREDICATE, json.loads(provenance.statement(self.manifest))["predicate"])
        }
        if _MLBOM in self.evidence:
            found["mlbom"] = (attestation.CYCLONEDX, json.loads(self.evidence[_MLBOM]))
        return found

    def about_the_image(self) -> dict[str, Stated]:
        """The statements about the image: those about the model in it, its own bill of materials and its VEX."""
        found = {**self.about_the_model(), "sbom": (attestation.CYCLONEDX, json.loads(self.evidence[_SBOM]))}
        scan = parse_scan(self.evidence[_SCAN], _SCAN)
        waived = vex_document.read_waived(self.evidence[_WAIVED])
        vex = vex_document.document(scan, waived, scan.purl or self.manifest.image.digest)
        return found if vex is None else {**found, "vex": (attestation.OPENVEX, vex)}

    def verdicts(self, stated: Mapping[str, Stated]) -> Verdicts:
        """The verdicts, which name all else that is ``stated``."""
        scan, verdicts = parse_scan(self.evidence[_SCAN], _SCAN), [record.verdict for record in self.manifest.gates]
        return Verdicts(
            release=self.manifest.name,
            manifest_digest=self.manifest.digest,
            image_digest=self.manifest.image.digest,
            sealed=self.manifest.created,
            passed=not any(verdict.blocks for verdict in verdicts),
            gates={verdict.gate: verdict for verdict in verdicts},
            scan=Scanned(at=f"{scan.scanned_at:%Y-%m-%dT%H:%M:%SZ}", database_updated_at=scan.database.updated_at),
            statements={title: digest_json(predicate) for title, (_, predicate) in stated.items()},
        )


def attest_image(release: StatedRelease, key: SigningKey, progress: Progress) -> None:
    """Sign the image of a release in its registry, and attach what is known of it; what is attached is not written.

    Its bills of materials are attached unsigned too, for scanners that look for those.

    Raises:
        DistributionError: the registry can't be reached, or has lost the image.
    """
    host, repository, digest = parse(release.manifest.image.reference)
    stated = release.about_the_image()
    with Registry(host) as registry:
        subject = referrers.subject_of(registry, repository, digest)
        new: list[str] = [
            title
            for title in ("mlbom", "sbom")
            if title in stated
            and referrers.attach(
                registry, repository, subject, mlbom.KIND, release.evidence[f"{EVIDENCE}/{title}.cdx.json"],
                title=f"{title}.cdx.json",
            ).is_new
        ]  # fmt: skip
        new += attach(registry, repository, subject, f"{host}/{repository}", stated, release.verdicts(stated), key)
    if new:
        progress(f"attached to {release.manifest.image.reference}: {', '.join(new)}")


def attach(
    registry: Registry,
    repository: str,
    subject: Mapping[str, Any],
    name: str,
    stated: Mapping[str, Stated],
    verdicts: Verdicts,
    key: SigningKey,
) -> list[str]:
    """Attach signed statements about a manifest, its verdicts and at last its signature; return what was new.

    ``subject`` is the manifest's descriptor, ``name`` what statements call it.
    """
    every: dict[str, Stated] = {
        **stated,
        "verdicts": (attestation.VERDICTS, verdicts.predicate()),
        "signature": (attestation.SIGNED, {}),
    }
    new: list[str] = []
    for title, (kind, predicate) in every.items():
        payload = attestation.statement(str(subject["digest"]), name, kind, predicate)
        bundle = sign_statement(payload, key, with_chain=False)
        annotations = {CONTENT: "dsse-envelope", PREDICATE_TYPE: kind}
        attached = referrers.attach(
            registry, repository, subject, MEDIA_TYPE, bundle,
            title=f"{title}.sigstore.json", annotations=annotations,
        )  # fmt: skip
        new += [title] * attached.is_new
    return new
