"""Signs a release in a container registry, and attaches what is known of it, for tools that know nothing of Slipway.

What is stated is made from the release's signed manifest and its evidence by pure functions, and the same key signs the
same statement with the same bytes, in every registry. So attaching twice writes nothing, and a new key adds its own
statements.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from containers.image import referrers
from containers.image.build import ImageRecord, parse_image
from containers.image.distribution import Registry, parse
from containers.image.weights import push_weights
from containers.scan import mlbom, vex_document
from containers.scan.evidence import parse_scan
from registry import attestation, provenance
from registry.attestation import Scanned, Verdicts
from registry.digests import digest_json, digest_of
from registry.errors import Problem, VerificationError
from registry.manifest import DOCUMENTS, EVIDENCE, MANIFEST, Manifest
from registry.policy import Trust, policy_of
from registry.progress import Progress
from registry.signing import SigningKey
from registry.sigstore_bundle import MEDIA_TYPE, sign_statement
from registry.verify import check_documents

CONTENT, PREDICATE_TYPE = "dev.sigstore.bundle.content", "dev.sigstore.bundle.predicateType"
"""The annotations by which Sigstore's clients find a bundle."""
IMAGE, ARTIFACT, VOLUME = "image", "weights", "volume"
"""What of a release is in a container registry: see `containers.image.weights`."""
_SBOM, _MLBOM, _SCAN, _WAIVED, _IMAGE = (
    f"{EVIDENCE}/{name}" for name in ("sbom.cdx.json", "mlbom.cdx.json", "scan.json", "waived.json", "image.json")
)
Stated = tuple[str, Mapping[str, Any]]
"""The type of a predicate, and the predicate."""


@dataclass(frozen=True)
class StatedRelease:
    """A release of which something is stated: its manifest, and the verified bytes of its folder ``release/``."""

    manifest: Manifest
    documents: Mapping[str, bytes]

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

    def stated(self, about: str) -> dict[str, Stated]:
        """The statements about the image, or about the weights where they are without it, by title."""
        found: dict[str, Stated] = {
            "provenance": (provenance.PREDICATE, json.loads(provenance.statement(self.manifest))["predicate"])
        }
        if _MLBOM in self.documents:
            found["mlbom"] = (attestation.CYCLONEDX, json.loads(self.documents[_MLBOM]))
        if about == IMAGE:
            found["sbom"] = (attestation.CYCLONEDX, json.loads(self.documents[_SBOM]))
            scan, waived = parse_scan(self.documents[_SCAN], _SCAN), vex_document.read_waived(self.documents[_WAIVED])
            vex = vex_document.document(scan, waived, scan.purl or self.manifest.image.digest)
            if vex is not None:
                found["vex"] = (attestation.OPENVEX, vex)
        return found

    def verdicts(self, stated: Mapping[str, Stated]) -> Verdicts:
        """The verdicts, which name all else that is ``stated``."""
        scan, verdicts = parse_scan(self.documents[_SCAN], _SCAN), [record.verdict for record in self.manifest.gates]
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
        pushed = push_weights(registry, repository, release.image, release.manifest, release.documents)
        signed = {IMAGE: digest, ARTIFACT: pushed.artifact, VOLUME: pushed.volume}
        for about, each in signed.items():
            new = attach(registry, repository, each, release, release.stated(about), key)
            if new:
                progress(f"attached to the {about} {host}/{repository}@{each}: {', '.join(new)}")
    return {about: f"{host}/{repository}@{each}" for about, each in signed.items()}


def attach(
    registry: Registry,
    repository: str,
    digest: str,
    release: StatedRelease,
    stated: Mapping[str, Stated],
    key: SigningKey,
) -> list[str]:
    """Attach signed statements about a manifest, the verdicts and at last a signature; return what was new."""
    subject = referrers.subject_of(registry, repository, digest)
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
            title=f"{title}.sigstore.json", annotations={CONTENT: "dsse-envelope", PREDICATE_TYPE: kind},
        )  # fmt: skip
        new += [title] * attached.is_new
    return new
